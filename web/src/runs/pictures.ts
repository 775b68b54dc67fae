/** Validation pictures as a grid: a row per prompt, size, seed and kind of weights, a column per step. Pure. */
import type { RunImage } from "../lib/types";

export interface Row {
  key: string;
  prompt: string;
  weights: string;
  about: RunImage;
  at: Map<number, RunImage>;
}

export interface Grid {
  steps: number[];
  rows: Row[];
}

const BASE = "base";
const ORDER: Record<string, number> = { trained: 0, ema: 1 };

function subject(picture: RunImage): string {
  return [picture.prompt_id, picture.prompt, picture.width_px, picture.height_px, picture.seed].join("\n");
}

/** The picture of the untouched base stands first in every row of its prompt. */
export function grid(pictures: RunImage[]): Grid {
  const kinds = new Set(pictures.map((one) => one.weights).filter((kind) => kind !== BASE));
  const all = kinds.size === 0 ? [BASE] : [...kinds];
  const rows = new Map<string, Row>();
  for (const picture of pictures) {
    for (const weights of picture.weights === BASE ? all : [picture.weights]) {
      const key = `${subject(picture)}\n${weights}`;
      const row = rows.get(key) ?? { key, prompt: picture.prompt, weights, about: picture, at: new Map() };
      row.at.set(picture.step, picture);
      rows.set(key, row);
    }
  }
  const steps = [...new Set(pictures.map((one) => one.step))].sort((a, b) => a - b);
  const sorted = [...rows.values()].sort((a, b) => (ORDER[a.weights] ?? 2) - (ORDER[b.weights] ?? 2));
  return { steps, rows: sorted };
}

interface Words {
  weights: Record<string, string>;
  strength: (value: string) => string;
}

/** What drew a picture, as a person reads it: "strength 0.5" is the LoRA at half its strength. */
export function drawnBy(weights: string, words: Words): string {
  const value = /^strength (.+)$/.exec(weights)?.[1];
  return value === undefined ? (words.weights[weights] ?? weights) : words.strength(value);
}

/** The pictures of a row in the order of their steps. */
export function ordered(row: Row): RunImage[] {
  return [...row.at.values()].sort((a, b) => a.step - b.step);
}

/** A picture drawn again at the same place replaces the older. */
export function add(pictures: RunImage[], arrived: RunImage[]): RunImage[] {
  if (arrived.length === 0) return pictures;
  const paths = new Set(arrived.map((one) => one.path));
  return [...pictures.filter((one) => !paths.has(one.path)), ...arrived];
}
