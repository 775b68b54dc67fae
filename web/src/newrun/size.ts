/** Bytes in GB (1e9), as cards are sold and `simpletuner plan` counts. */
import { number } from "../lib/format";

export function size(bytes: number): string {
  return bytes >= 1e9 ? `${number(bytes / 1e9, 1)} GB` : `${number(bytes / 1e6)} MB`;
}
