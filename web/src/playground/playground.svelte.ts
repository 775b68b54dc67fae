/** The request for images, the LoRAs to choose from, and the generations, which are loaded while one is active. */
import { api, isUnreachable } from "../lib/api";
import { attempt } from "../lib/toast.svelte";
import type { Generation, GenerationRequest, Job, LoraInfo } from "../lib/types";

export interface Form {
  prompts: string;
  negative: string;
  flavour: NonNullable<GenerationRequest["flavour"]>;
  loras: string[];
  strengths: string;
  steps: number;
  guidance: number;
  seed: number;
  count: number;
  size: string;
  image: string;
  denoise: number;
  mask: string;
}

const POLL_MS = 1500;
const STORAGE_KEY = "simpletuner.playground";
const INITIAL: Form = { prompts: "", negative: "", flavour: "", loras: [], strengths: "1", steps: 20, guidance: 1, seed: 42, count: 1, size: "", image: "", denoise: 0.5, mask: "" };

export function isActive(job: Job | null | undefined): boolean {
  return job !== null && job !== undefined && !["done", "failed", "stopped", "lost"].includes(job.state);
}

function stored(): Form {
  try {
    return { ...INITIAL, ...(JSON.parse(sessionStorage.getItem(STORAGE_KEY) ?? "{}") as Partial<Form>) };
  } catch {
    return INITIAL;
  }
}

export class Playground {
  form = $state<Form>(stored());
  loras = $state.raw<LoraInfo[]>([]);
  generations = $state.raw<Generation[] | null>(null);
  #timer = 0;
  #closed = false;

  async load(lora: string | null): Promise<void> {
    await attempt(async () => {
      this.loras = await api.get("/api/v1/loras");
      if (lora !== null && this.loras.some(({ path }) => path === lora)) this.form.loras = [lora];
      if (this.form.prompts === "" && this.form.flavour === "" && this.loras.length === 0) this.form.flavour = "nano";
    });
    await this.refresh();
  }

  async refresh(): Promise<void> {
    clearTimeout(this.#timer);
    try {
      this.generations = await api.get("/api/v1/generations");
    } catch (error) {
      if (!isUnreachable(error)) throw error;
    }
    const waits = this.generations === null || this.generations.some(({ job }) => isActive(job));
    if (!this.#closed && waits) this.#timer = window.setTimeout(() => void this.refresh(), POLL_MS);
  }

  get strengths(): number[] {
    return this.form.strengths.split(/[,;\s]+/).filter((part) => part !== "").map(Number);
  }

  get prompts(): string[] {
    return this.form.prompts.split("\n").map((line) => line.trim()).filter((line) => line !== "");
  }

  /** Queue one generation per LoRA; together they are a grid. */
  async generate(): Promise<void> {
    const { negative, flavour, loras, steps, guidance, seed, count, size, image, denoise, mask } = this.form;
    sessionStorage.setItem(STORAGE_KEY, JSON.stringify(this.form));
    const group = Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const shared = { prompts: this.prompts, negative_prompt: negative, flavour, precision: "" as const, steps, guidance, seed, count, size, image, denoise, mask, invert_mask: false, group };
    for (const lora of loras.length === 0 ? [""] : loras) {
      const body: GenerationRequest = { ...shared, lora, strengths: lora === "" ? [1] : this.strengths };
      await api.post("/api/v1/generations", { body });
    }
    await this.refresh();
  }

  /** Take the settings of an earlier generation. */
  reuse(request: GenerationRequest): void {
    this.form = {
      prompts: request.prompts.join("\n"),
      negative: request.negative_prompt ?? "",
      flavour: request.flavour ?? "",
      loras: request.lora ? [request.lora] : [],
      strengths: (request.strengths ?? [1]).join(", "),
      steps: request.steps ?? 20,
      guidance: request.guidance ?? 1,
      seed: request.seed ?? 42,
      count: request.count ?? 1,
      size: request.size ?? "",
      image: request.image ?? "",
      denoise: request.denoise ?? 0.5,
      mask: request.mask ?? "",
    };
    scrollTo({ top: 0 });
  }

  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
  }
}
