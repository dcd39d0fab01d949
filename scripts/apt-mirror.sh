#!/usr/bin/env bash
# Prints the mirror that apt takes this release of the distribution from; nothing where it has none.
set -euo pipefail
. /etc/os-release
apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
  awk -v release="$VERSION_CODENAME" '$2 == release && !found { print $1; found = 1 }'
