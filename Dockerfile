# One unetd server. Build: docker build -t unetd .   Run, with a token, models from the host and a GPU:
#   docker run --gpus all -p 8700:8700 -e UNETD_TOKEN=... -v ~/ComfyUI/models:/models:ro unetd            (NVIDIA)
#   docker run --device /dev/dri --group-add "$(getent group render | cut -d: -f3)" -p 8700:8700 ... unetd   (AMD, Intel)
# Without either it computes on the CPU. Every setting is a variable UNETD_*; docs/OPERATION.md lists them.

FROM node:22-trixie-slim AS build
WORKDIR /build
COPY package.json package-lock.json .npmrc ./
RUN npm ci --ignore-scripts
COPY tsconfig.json tsconfig.build.json ./
COPY src ./src
RUN npm run build && npm prune --omit=dev --ignore-scripts

FROM node:22-trixie-slim
# The Vulkan loader, Mesa's drivers (AMD, Intel, software), and what NVIDIA's own driver, which the host brings, links to.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libvulkan1 mesa-vulkan-drivers libx11-6 libxext6 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY --from=build /build/node_modules ./node_modules
COPY --from=build /build/dist ./dist
COPY package.json ./
COPY assets ./assets
COPY shaders ./shaders
ENV NODE_ENV=production \
    NVIDIA_DRIVER_CAPABILITIES=graphics,compute,utility \
    UNETD_HOST=0.0.0.0 \
    UNETD_MODELS=/models
USER node
EXPOSE 8700
# Open requests are finished first: give `docker stop` the time, with --stop-timeout 150.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --interval=10s \
    CMD ["node", "-e", "fetch('http://127.0.0.1:8700/healthz').then((r) => process.exit(r.ok ? 0 : 1), () => process.exit(1))"]
ENTRYPOINT ["node", "dist/cli.js"]
CMD ["serve"]
