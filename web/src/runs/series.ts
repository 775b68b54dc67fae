/** Pure functions on the metrics columns of a run: appending, smoothing, and the two x axes. */
import type { RunMetrics } from "../lib/types";
import type { RunEvent } from "./events";

export type Axis = "step" | "minute";
type Column = (number | null)[];

/** Append new events to the columns; returns the same object if nothing changes. */
export function append(metrics: RunMetrics, events: RunEvent[]): RunMetrics {
  const last = metrics.step.at(-1) ?? -1;
  const steps = events.filter((event) => event.kind === "step").filter((event) => event.step > last);
  const evaluated = events.filter((event) => event.kind === "evaluated").filter((event) => event.loss !== null);
  const scored = events.filter((event) => event.kind === "scored");
  if (steps.length + evaluated.length + scored.length === 0) return metrics;
  const seen = new Set(metrics.held_out.map(([step, split]) => `${step} ${split}`));
  const seenScores = new Set(metrics.scores.map(([step, metric]) => `${step} ${metric}`));
  return {
    ...metrics,
    step: [...metrics.step, ...steps.map((event) => event.step)],
    t: [...metrics.t, ...steps.map((event) => event.t)],
    loss: [...metrics.loss, ...steps.map((event) => event.loss)],
    learning_rate: [...metrics.learning_rate, ...steps.map((event) => event.learning_rate)],
    grad_norm: [...metrics.grad_norm, ...steps.map((event) => event.grad_norm)],
    seconds: [...metrics.seconds, ...steps.map((event) => event.seconds)],
    memory_gib: [...metrics.memory_gib, ...steps.map((event) => event.memory_gib)],
    held_out: [
      ...metrics.held_out,
      ...evaluated
        .filter((event) => !seen.has(`${event.step} ${event.split}`))
        .map((event): [number, string, number] => [event.step, event.split, event.loss ?? 0]),
    ],
    scores: [
      ...metrics.scores,
      ...scored
        .filter((event) => !seenScores.has(`${event.step} ${event.metric}`))
        .flatMap((event) =>
          Object.entries(event.rates).map(([name, [rate]]): [number, string, string, number, string] => [
            event.step,
            event.metric,
            name,
            rate,
            event.unit ?? "share",
          ]),
        ),
    ],
  };
}

/** Exponential moving average with bias correction, so that the first value is the first loss. */
export function smooth(values: Column, weight: number): Column {
  let mean = 0;
  let bias = 1;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    bias *= weight;
    return mean / (1 - bias);
  });
}

/** Minutes of training at each step. A pause before a resumed step is replaced by the duration of that step. */
export function minutes(metrics: RunMetrics): number[] {
  let spent = 0;
  return metrics.step.map((step, at) => {
    const before = metrics.step[at - 1] ?? 0;
    const seconds = metrics.seconds[at] ?? 0;
    const resumed = metrics.resumes.some((edge) => edge >= before && edge < step);
    const passed = at === 0 || resumed ? (step - before) * seconds : (metrics.t[at] ?? 0) - (metrics.t[at - 1] ?? 0);
    spent += Math.max(0, passed) / 60;
    return spent;
  });
}

/** Return the x position of a step, interpolated if the step was removed by downsampling. */
export function interpolateX(steps: number[], xs: number[], step: number): number {
  const after = steps.findIndex((candidate) => candidate >= step);
  if (after === -1) return xs.at(-1) ?? step;
  const [x = 0, s = 0] = [xs[after], steps[after]];
  if (s === step) return x;
  const [x0, s0] = after === 0 ? [0, 0] : [xs[after - 1] ?? 0, steps[after - 1] ?? 0];
  return x0 + ((x - x0) * (step - s0)) / Math.max(1, s - s0);
}

/** Join series on a common x column; missing values are null. */
export function join(series: { xs: number[]; ys: Column }[]): [number[], ...Column[]] {
  const xs = [...new Set(series.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const at = new Map(xs.map((x, index) => [x, index]));
  const columns = series.map((line) => {
    const column: Column = Array.from({ length: xs.length }, () => null);
    line.xs.forEach((x, index) => {
      column[at.get(x) ?? 0] = line.ys[index] ?? null;
    });
    return column;
  });
  return [xs, ...columns];
}
