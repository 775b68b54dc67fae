/** The draft being edited: every change is saved, validated and planned. */
import { api, ApiError, url } from "../lib/api";
import { explain } from "../lib/toast.svelte";
import type { ErrorDetail, Draft, OptionInfo, FormSchema, ConfigValidationResult, PromptEntry } from "../lib/types";
import { PlanPoller } from "./plan.svelte";
import { isEqual, withValue, type Values } from "./values";

type Saving = "saved" | "unsaved" | "saving" | "failed" | "conflict";
const SAVE_MS = 400;
const CHECK_MS = 300;
const RETRY_MS = 5000;
const SUGGESTED_PROMPTS = 2;
const DEFAULT_STEPS = 1000;

export class DraftForm {
  readonly options: Map<string, OptionInfo>;
  readonly plan = new PlanPoller();
  name = $state("");
  config = $state.raw<Values>({});
  datasets = $state.raw<Values[]>([]);
  prompts = $state.raw<PromptEntry[]>([]);
  saving = $state<Saving>("saved");
  why = $state("");
  validation = $state.raw<ConfigValidationResult | null>(null);
  checking = $state(false);
  /** Why the start was rejected; cleared by the next change. */
  startErrors = $state.raw<ErrorDetail[]>([]);
  checkErrors = $state.raw<ErrorDetail[]>([]);
  theirs = $state.raw<Draft | null>(null);
  /** A dataset was added to a draft without prompts: its captions become prompts once they are known. */
  wantsPrompts = false;
  #draft: Draft;
  #dirty = false;
  #running: Promise<boolean> | null = null;
  #saveTimer = 0;
  #checkTimer = 0;
  #checks = 0;

  constructor(
    readonly schema: FormSchema,
    draft: Draft,
  ) {
    this.options = new Map(schema.options.map((option) => [option.name, option]));
    this.#draft = draft;
    this.#adopt(draft);
  }

  get id(): string {
    return this.#draft.id;
  }

  get version(): number {
    return this.#draft.version;
  }

  readonly problems = $derived.by(() => this.validation?.problems ?? []);
  readonly general = $derived.by(() => [...this.startErrors, ...this.checkErrors, ...this.problems.filter((problem) => !this.#hasField(problem.loc))]);

  readonly warnings = $derived.by(() => this.validation?.warnings ?? []);
  /** The folder that the run will be written to. */
  readonly runDir = $derived.by(() => this.validation?.run_dir ?? "");
  /** The number of steps, null if it follows from the epochs. */
  readonly steps = $derived.by(() => {
    const given = this.config.max_train_steps;
    if (typeof given === "number") return given;
    return this.config.num_train_epochs === undefined ? DEFAULT_STEPS : null;
  });

  warningsOf(loc: string): string[] {
    return this.warnings.filter((warning) => warning.loc === loc).map((warning) => warning.message);
  }

  /** A value that would solve the problem of a field, "" if none is known. */
  suggestionOf(loc: string): string {
    return [...this.startErrors, ...this.problems].find((problem) => problem.loc === loc)?.suggestion ?? "";
  }

  /** Take captions of the datasets as prompts. */
  usePromptsFromCaptions(): void {
    const taken = new Set(this.prompts.map((entry) => entry.prompt));
    const captions = (this.validation?.captions ?? []).filter((caption) => !taken.has(caption)).slice(0, SUGGESTED_PROMPTS);
    if (captions.length === 0) return;
    const names = new Set(this.prompts.map((entry) => entry.name));
    const added = captions.map((prompt): PromptEntry => {
      let number = 1;
      while (names.has(`caption-${number}`)) number += 1;
      names.add(`caption-${number}`);
      return { name: `caption-${number}`, prompt, negative_prompt: "", seed: null, size: "", adapter_strength: 1 };
    });
    this.prompts = [...this.prompts, ...added];
    this.touch();
  }

  /** The problems of a field, from the last validation and from the start. */
  problemsOf(loc: string): string[] {
    return [...this.startErrors, ...this.problems].filter((problem) => problem.loc === loc).map((problem) => problem.message);
  }

  #hasField(loc: string): boolean {
    const fields = this.schema.dataset_fields;
    return (
      this.options.has(loc) ||
      this.datasets.some((set) => loc === set.id || fields.some((field) => loc === `${String(set.id)}.${field.name}`))
    );
  }

  set(option: OptionInfo, value: unknown): void {
    this.config = withValue(this.config, option, value);
    this.touch();
  }

  /** Set many options at once: a preset, an import, fitting settings. */
  merge(values: Values): void {
    for (const [name, value] of Object.entries(values)) {
      const option = this.options.get(name);
      this.config = option === undefined ? { ...this.config, [name]: value } : withValue(this.config, option, value);
    }
    this.touch();
  }

  replace(config: Values | null, datasets: Values[] | null): void {
    if (config !== null) this.config = config;
    if (datasets !== null) this.datasets = datasets;
    this.touch();
  }

  touch(): void {
    this.#dirty = true;
    this.startErrors = [];
    if (this.saving !== "conflict") this.saving = "unsaved";
    clearTimeout(this.#saveTimer);
    this.#saveTimer = window.setTimeout(() => void this.flush(), SAVE_MS);
    this.check();
  }

  check(): void {
    this.checking = true;
    clearTimeout(this.#checkTimer);
    this.#checkTimer = window.setTimeout(() => void this.#check(), CHECK_MS);
  }

  async #check(): Promise<void> {
    const check = ++this.#checks;
    const body = { config: this.config, datasets: this.datasets, name: this.name };
    try {
      const validation = await api.post("/api/v1/validate", { body });
      if (check !== this.#checks) return;
      const warnings = (validation.warnings ?? []).filter((warning) => warning.loc !== "validation_prompt" || this.prompts.length === 0);
      this.validation = { ...validation, warnings };
      if (this.wantsPrompts && validation.captions?.length) {
        this.wantsPrompts = false;
        const rejected = this.startErrors; // the prompts are no change of the user, who still has to read them
        if (this.prompts.length === 0 && !this.config.validation_prompt) this.usePromptsFromCaptions();
        this.startErrors = rejected;
      }
      this.checkErrors = [];
      if (validation.problems.some((problem) => this.options.has(problem.loc))) this.plan.wait();
      else this.plan.ask(body.config, body.datasets);
    } catch (error) {
      if (check === this.#checks) this.checkErrors = [{ loc: "", message: explain(error), where: "", suggestion: "" }];
    }
    if (check === this.#checks) this.checking = false;
  }

  /** Save all changes; returns true when the server has them. */
  async flush(): Promise<boolean> {
    clearTimeout(this.#saveTimer);
    while (this.#dirty || this.#running !== null) {
      if (this.theirs !== null) return false;
      this.#running ??= this.#put().finally(() => (this.#running = null));
      if (!(await this.#running)) return false;
    }
    return true;
  }

  async #put(): Promise<boolean> {
    this.#dirty = false;
    this.saving = "saving";
    try {
      this.#draft = await api.put("/api/v1/drafts/{id}", { path: { id: this.id }, body: this.#body() });
      this.saving = this.#dirty ? "unsaved" : "saved";
      return true;
    } catch (error) {
      this.#dirty = true;
      if (error instanceof ApiError && error.status === 409) return this.#loadConflict();
      this.saving = "failed";
      this.why = explain(error);
      this.#saveTimer = window.setTimeout(() => void this.flush(), RETRY_MS);
      return false;
    }
  }

  #body() {
    return { name: this.name.trim() || this.#draft.name, config: this.config, datasets: this.datasets, prompts: this.prompts, version: this.version };
  }

  /** Load the version that was saved elsewhere; the same content is not a conflict. */
  async #loadConflict(): Promise<boolean> {
    try {
      const theirs = await api.get("/api/v1/drafts/{id}", { path: { id: this.id } });
      if (isEqual([theirs.name, theirs.config, theirs.datasets, theirs.prompts], [this.name, this.config, this.datasets, this.prompts])) {
        this.#draft = theirs;
        this.#dirty = false;
        this.saving = "saved";
        return true;
      }
      this.theirs = theirs;
      this.saving = "conflict";
    } catch (error) {
      this.saving = "failed";
      this.why = explain(error);
    }
    return false;
  }

  /** End a conflict with the version of the other tab, or with this one. */
  resolveConflict(take: boolean): void {
    if (this.theirs === null) return;
    const theirs = this.theirs;
    this.theirs = null;
    this.saving = "unsaved";
    if (take) this.#adopt(theirs);
    else {
      this.#draft = theirs;
      this.touch();
    }
  }

  /** Load changes of another tab, unless this one has changes. */
  async reload(): Promise<void> {
    if (this.#dirty || this.#running !== null || this.theirs !== null) return;
    try {
      const loaded = await api.get("/api/v1/drafts/{id}", { path: { id: this.id } });
      if (loaded.version > this.version && !this.#dirty) this.#adopt(loaded);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error; // the next save reports it
    }
  }

  #adopt(draft: Draft): void {
    this.#draft = draft;
    this.#dirty = false;
    this.startErrors = [];
    this.name = draft.name;
    this.config = draft.config;
    this.datasets = draft.datasets;
    this.prompts = draft.prompts ?? [];
    this.saving = "saved";
    this.check();
  }

  /** Save when the page is closed, without waiting for the response. */
  saveOnLeave(): void {
    clearTimeout(this.#checkTimer);
    clearTimeout(this.#saveTimer);
    this.plan.close();
    if (!this.#dirty || this.theirs !== null) return;
    this.#dirty = false;
    void fetch(url("/api/v1/drafts/{id}", { id: this.id }), {
      method: "PUT",
      keepalive: true,
      headers: { "content-type": "application/json" },
      body: JSON.stringify(this.#body()),
    });
  }
}
