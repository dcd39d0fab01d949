/**
 * Reads the fields of a control message one by one and says what is wrong with them. Knows JSON types only, no operation.
 */
import { UnetdError } from '../errors.ts';
import type { JsonObject } from './wire.ts';

/** ERR_BAD_REQUEST where the message has a field that the operation does not take. `id` and `op` always belong. */
export function onlyFields(header: JsonObject, op: string, known: readonly string[]): void {
  const extra = Object.keys(header).filter((name) => name !== 'id' && name !== 'op' && !known.includes(name));
  if (extra.length === 0) return;
  const takes = known.length === 0 ? 'no further fields' : `the fields ${known.join(', ')}`;
  refuse(`"${op}" takes ${takes}, got "${extra[0]!.slice(0, 100)}"`);
}

export function textField(header: JsonObject, name: string): string {
  const value = header[name];
  if (typeof value === 'string' && value !== '') return value;
  return refuse(`"${name}" must be a non-empty string, got ${describe(value)}`);
}

export function textsField(header: JsonObject, name: string): readonly string[] {
  const value = header[name];
  if (Array.isArray(value) && value.every((each) => typeof each === 'string')) return value;
  return refuse(`"${name}" must be a list of strings, got ${describe(value)}`);
}

export function countField(header: JsonObject, name: string, from: number, to: number): number {
  const value = header[name];
  if (typeof value === 'number' && Number.isInteger(value) && value >= from && value <= to) return value;
  return refuse(`"${name}" must be a whole number from ${from} to ${to}, got ${describe(value)}`);
}

export function choiceField<Choice extends string>(
  header: JsonObject,
  name: string,
  choices: readonly Choice[],
): Choice | undefined {
  const value = header[name];
  if (value === undefined) return undefined;
  const found = choices.find((choice) => choice === value);
  return found ?? refuse(`"${name}" must be one of ${choices.join(', ')}, got ${describe(value)}`);
}

/** A JSON object or nothing; nothing counts as an empty one. */
export function objectField(header: JsonObject, name: string): JsonObject {
  const value = header[name];
  if (value === undefined) return {};
  if (isObject(value)) return value;
  return refuse(`"${name}" must be an object, got ${describe(value)}`);
}

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** Always throws ERR_BAD_REQUEST. */
export function refuse(message: string): never {
  throw new UnetdError('ERR_BAD_REQUEST', `${message}.`);
}

/** A value as a message shows it: short, and safe for values of any depth. */
export function describe(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (value === null) return 'null';
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (typeof value === 'object') return 'an object';
  return JSON.stringify(value).slice(0, 100);
}
