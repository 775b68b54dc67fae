/** Validation images as a grid: one row per prompt, size, seed and kind of weights, one column per step. */
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

/** The key of the rows that show the same prompt, size and seed. */
function subject(image: RunImage): string {
  return [image.prompt_id, image.prompt, image.width_px, image.height_px, image.seed].join("\n");
}

/** Arrange the images; the image of the base model comes first in every row of its prompt. */
export function grid(images: RunImage[]): Grid {
  const kinds = new Set(images.map((image) => image.weights).filter((kind) => kind !== BASE));
  const allKinds = kinds.size === 0 ? [BASE] : [...kinds];
  const rows = new Map<string, Row>();
  for (const image of images) {
    for (const weights of image.weights === BASE ? allKinds : [image.weights]) {
      const key = `${subject(image)}\n${weights}`;
      const row = rows.get(key) ?? { key, prompt: image.prompt, weights, about: image, at: new Map() };
      row.at.set(image.step, image);
      rows.set(key, row);
    }
  }
  const steps = [...new Set(images.map((image) => image.step))].sort((a, b) => a - b);
  const sorted = [...rows.values()].sort((a, b) => (ORDER[a.weights] ?? 2) - (ORDER[b.weights] ?? 2));
  return { steps, rows: sorted };
}

interface Texts {
  weights: Record<string, string>;
  strength: (value: string) => string;
}

/** A label for the weights of an image; "strength 0.5" is the LoRA at half its strength. */
export function weightsLabel(weights: string, texts: Texts): string {
  const value = /^strength (.+)$/.exec(weights)?.[1];
  return value === undefined ? (texts.weights[weights] ?? weights) : texts.strength(value);
}

/** The images of a row, ordered by step. */
export function ordered(row: Row): RunImage[] {
  return [...row.at.values()].sort((a, b) => a.step - b.step);
}

/** Add new images; one with the path of an older image replaces it. */
export function add(images: RunImage[], added: RunImage[]): RunImage[] {
  if (added.length === 0) return images;
  const paths = new Set(added.map((image) => image.path));
  return [...images.filter((image) => !paths.has(image.path)), ...added];
}
