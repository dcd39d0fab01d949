/** An UnetdError as data that can be cloned between processes, and back. */
import { isErrorCode, UnetdError } from '../errors.ts';

export interface WireFault {
  readonly code: string;
  readonly message: string;
  readonly details: Readonly<Record<string, unknown>>;
}

export function toFault(error: unknown): WireFault {
  const { code, message, details } = UnetdError.from(error);
  return { code, message, details };
}

export function fromFault({ code, message, details }: WireFault): UnetdError {
  return new UnetdError(isErrorCode(code) ? code : 'ERR_INTERNAL', message, details);
}
