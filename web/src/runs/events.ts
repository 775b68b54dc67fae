/** The events that the pages use, as they are in events.jsonl. */
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
  unit?: string;
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
/** A process started or resumed: later steps of the previous process are void. */
interface Restarted {
  kind: "run_started" | "resumed";
}
/** These events change the details of the run, which are then loaded again. */
interface DetailChanged {
  kind: "saved" | "noted" | "warned" | "checkpoint_set_aside" | "finished" | "failed" | "verdict" | "prompts";
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
  | DetailChanged;
