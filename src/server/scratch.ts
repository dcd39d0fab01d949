/**
 * The private temporary folder of a server: made anew for each, and those of servers that were killed are removed when the next one
 * starts. The name tells whose a folder is. Knows nothing of what is in it.
 */
import { lstat, mkdtemp, readdir, rm } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';

const PREFIX = 'unetd-uploads-';
const NAME = /^unetd-uploads-(?<host>.+)-(?<pid>\d+)-[A-Za-z0-9]{6}$/;

/** Makes the folder, readable by its owner only, and removes what dead servers of this user and machine left beside it. */
export async function openScratch(parent: string = tmpdir()): Promise<string> {
  await removeLeftovers(parent);
  return mkdtemp(join(parent, `${PREFIX}${thisHost()}-${process.pid}-`));
}

async function removeLeftovers(parent: string): Promise<void> {
  for (const name of await readdir(parent).catch(() => [])) {
    const path = join(parent, name);
    // Another server may remove it at the same time: then there is nothing left to do.
    if (await isLeftover(path, name).catch(() => false)) {
      await rm(path, { recursive: true, force: true }).catch(() => {});
    }
  }
}

async function isLeftover(path: string, name: string): Promise<boolean> {
  const { host, pid } = NAME.exec(name)?.groups ?? {};
  if (host !== thisHost() || pid === undefined) return false;
  const folder = await lstat(path);
  // A folder or link of another user in a place that all may write to could lead anywhere.
  if (!folder.isDirectory() || folder.uid !== (process.getuid?.() ?? folder.uid)) return false;
  return isDead(Number(pid), folder.birthtimeMs);
}

/** Whether the process that had this number at that time is gone. In doubt it is not. */
function isDead(pid: number, at: number): boolean {
  // In containers every server may have the same number: a folder older than this process is not of this process.
  if (pid === process.pid) return Date.now() - process.uptime() * 1000 > at + 2000;
  try {
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'ESRCH';
  }
}

function thisHost(): string {
  return hostname().replaceAll(/[^A-Za-z0-9.-]/g, '_') || 'host';
}
