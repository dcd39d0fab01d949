/**
 * Installs the peers under `.cache/bench/peers`, and writes their ONNX graphs. Nothing of it is a dependency of the package;
 * what cannot be had is said, and left out. Measures nothing.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { ROOT } from '../../test/launch.ts';
import { modelFile } from '../full-size.ts';
import { type Job, PEERS } from './works.ts';

const VENV = `${PEERS}venv`;
const REFERENCE = `${ROOT}.cache/reference-env/venv`;

/** Has onnx, ncnn and tinygrad; and PyTorch, once `reference` is installed. */
export const PYTHON: string = `${VENV}/bin/python`;

/** What `sd_cpp.py` calls. */
export const SD_CPP: string = `${PEERS}sd_cpp/libsd_unet.so`;

const ONNXRUNTIME = 'onnxruntime-node@1.30.0';
const PACKAGES = ['numpy', 'onnx==1.23.2', 'ncnn==1.0.20261020', 'tinygrad==0.14.0', 'dawn-python==0.3.0'];

function call(program: string, ...args: readonly string[]): void {
  execFileSync(program, args, { cwd: ROOT, stdio: ['ignore', 'ignore', 'inherit'] });
}

function pythonFolder(venv: string): string {
  const [version] = readdirSync(`${venv}/lib`).filter((name) => name.startsWith('python'));
  return `${venv}/lib/${version}/site-packages`;
}

function installNpm(): void {
  if (existsSync(`${PEERS}node_modules/onnxruntime-node`)) return;
  // Its install script fetches CUDA libraries.
  const quiet = ['--ignore-scripts', '--no-audit', '--no-fund', '--no-package-lock'];
  call('npm', 'install', '--prefix', PEERS, ...quiet, ONNXRUNTIME);
}

function installVenv(): void {
  const installed = `${PEERS}installed`;
  const packages = PACKAGES.join('\n');
  if (existsSync(installed) && readFileSync(installed, 'utf8') === packages) return;
  call('python3', '-m', 'venv', VENV);
  call(PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', ...PACKAGES);
  writeFileSync(installed, packages);
}

function installReference(): void {
  installVenv();
  call('bash', 'test/reference/setup.sh');
  writeFileSync(`${pythonFolder(VENV)}/reference.pth`, `${pythonFolder(REFERENCE)}\n`);
}

/** Once: what is built stays. */
function buildSdCpp(): void {
  installVenv();
  if (!existsSync(SD_CPP)) call('bash', 'bench/peers/sd_cpp/build.sh', dirname(SD_CPP), PYTHON, '-m', 'pip');
}

function findCard(python: string): void {
  const check = 'import torch; assert torch.cuda.is_available(), "PyTorch finds no card with CUDA"';
  const { status, stderr, error } = spawnSync(python, ['-c', check], { encoding: 'utf8' });
  if (status !== 0) throw error ?? new Error(stderr.trim().split('\n').at(-1));
}

export type Need = 'npm' | 'venv' | 'reference' | 'card' | 'sd_cpp';
const STEPS: Readonly<Record<Need, (python: string) => void>> = {
  npm: installNpm,
  venv: installVenv,
  reference: installReference,
  card: findCard,
  sd_cpp: buildSdCpp,
};

const done = new Map<Need, string | undefined>();

/** Installs what is needed, each at most once. Gives the reason why something cannot be had. `python`: that of the peer. */
export function install(needs: readonly Need[], python: string): string | undefined {
  for (const need of needs) {
    if (!done.has(need))
      done.set(
        need,
        failure(() => STEPS[need](python)),
      );
    const reason = done.get(need);
    if (reason !== undefined) return reason;
  }
  return undefined;
}

function failure(step: () => void): string | undefined {
  try {
    step();
    return undefined;
  } catch (error) {
    return String(error);
  }
}

/** The graphs of a work, unless they are there. */
export function writeGraphs({ op, full, onnx, onnxOnce, data, repeats, heads, checkpoint }: Job): void {
  if (full) {
    modelFile(full.model);
    const args = [checkpoint, full.model, String(full.size), onnx];
    if (!existsSync(onnx)) call(PYTHON, 'bench/peers/export_unet.py', ...args);
    return;
  }
  for (const [path, times] of [
    [onnx, repeats],
    [onnxOnce, 1],
  ] as const) {
    if (existsSync(path)) continue;
    call(PYTHON, 'bench/peers/models.py', op, data, `${path}.part`, String(times), String(heads));
    renameSync(`${path}.part`, path);
  }
}
