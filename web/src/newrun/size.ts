/** Format bytes in GB (1e9), the unit of GPU vendors and of `simpletuner plan`. */
import { number } from "../lib/format";

export function size(bytes: number): string {
  return bytes >= 1e9 ? `${number(bytes / 1e9, 1)} GB` : `${number(bytes / 1e6)} MB`;
}
