/** The events of a run that the page understands, as they stand in events.jsonl. */
import type { RunImage } from "../lib/types";

interface Stepped {
  kind: "step";
  t: number;
  step: number;
  loss: number | null;
  learning_rate: number;
  grad_norm: number | null;
  seconds: number;
  memory_gib: number | null;
}
interface Evaluated {
  kind: "evaluated";
  step: number;
  split: string;
  loss: number | null;
}
interface Scored {
  kind: "scored";
  step: number;
  metric: string;
  rates: Record<string, [number, number, number]>;
}
type ImageSaved = { kind: "image" } & RunImage;
interface StageStarted {
  kind: "stage_started";
  stage: string;
  total: number | null;
  unit: string;
}
interface StageProgress {
  kind: "stage_progress";
  stage: string;
  done: number;
  total: number | null;
  left_s: number | null;
}
interface StageDone {
  kind: "stage_done";
  stage: string;
}
/** A process began or went on from a checkpoint: what came after that step is no longer the run's. */
interface Restarted {
  kind: "run_started" | "resumed";
}
/** These change the run's detail: it is asked for again. */
interface Told {
  kind: "saved" | "noted" | "warned" | "checkpoint_set_aside" | "finished" | "failed";
}

export type RunEvent =
  | Stepped
  | Evaluated
  | Scored
  | ImageSaved
  | StageStarted
  | StageProgress
  | StageDone
  | Restarted
  | Told;
