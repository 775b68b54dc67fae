/** One draft as it is edited: saved, checked and priced with every change. */
import { api, Refused, url } from "../lib/api";
import { explain } from "../lib/toast.svelte";
import type { ErrorDetail, Draft, OptionInfo, FormSchema, ConfigValidationResult } from "../lib/types";
import { PlanWatch } from "./plan.svelte";
import { changed, same, type Values } from "./values";

type Saving = "saved" | "unsaved" | "saving" | "failed" | "conflict";
const SAVE_MS = 400;
const CHECK_MS = 300;
const AGAIN_MS = 5000;

export class DraftForm {
  readonly options: Map<string, OptionInfo>;
  readonly plan = new PlanWatch();
  name = $state("");
  config = $state.raw<Values>({});
  datasets = $state.raw<Values[]>([]);
  saving = $state<Saving>("saved");
  why = $state("");
  verdict = $state.raw<ConfigValidationResult | null>(null);
  checking = $state(false);
  /** Why it was not started; true until something is changed. */
  refused = $state.raw<ErrorDetail[]>([]);
  unchecked = $state.raw<ErrorDetail[]>([]);
  theirs = $state.raw<Draft | null>(null);
  #draft: Draft;
  #dirty = false;
  #running: Promise<boolean> | null = null;
  #saveTimer = 0;
  #checkTimer = 0;
  #asked = 0;

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

  readonly problems = $derived.by(() => this.verdict?.problems ?? []);
  readonly general = $derived.by(() => [...this.refused, ...this.unchecked, ...this.problems.filter((one) => !this.#hasField(one.loc))]);

  /** What the last check says of a field, and what refused the start. */
  problemsOf(loc: string): string[] {
    return [...this.refused, ...this.problems].filter((one) => one.loc === loc).map((one) => one.message);
  }

  #hasField(loc: string): boolean {
    const fields = this.schema.dataset_fields;
    return (
      this.options.has(loc) ||
      this.datasets.some((set) => loc === set.id || fields.some((field) => loc === `${String(set.id)}.${field.name}`))
    );
  }

  set(option: OptionInfo, value: unknown): void {
    this.config = changed(this.config, option, value);
    this.touch();
  }

  /** Many options at once: a preset, an import, what fits. */
  merge(values: Values): void {
    for (const [name, value] of Object.entries(values)) {
      const option = this.options.get(name);
      this.config = option === undefined ? { ...this.config, [name]: value } : changed(this.config, option, value);
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
    this.refused = [];
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
    const asked = ++this.#asked;
    const body = { config: this.config, datasets: this.datasets };
    try {
      const verdict = await api.post("/api/v1/validate", { body });
      if (asked !== this.#asked) return;
      this.verdict = verdict;
      this.unchecked = [];
      if (verdict.problems.some((one) => this.options.has(one.loc))) this.plan.wait();
      else this.plan.ask(body.config, body.datasets);
    } catch (error) {
      if (asked === this.#asked) this.unchecked = [{ loc: "", message: explain(error), where: "" }];
    }
    if (asked === this.#asked) this.checking = false;
  }

  /** True when the server holds everything. */
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
      if (error instanceof Refused && error.status === 409) return this.#conflict();
      this.saving = "failed";
      this.why = explain(error);
      this.#saveTimer = window.setTimeout(() => void this.flush(), AGAIN_MS);
      return false;
    }
  }

  #body() {
    return { name: this.name.trim() || this.#draft.name, config: this.config, datasets: this.datasets, version: this.version };
  }

  /** Somebody else was faster. The same content is no conflict. */
  async #conflict(): Promise<boolean> {
    try {
      const theirs = await api.get("/api/v1/drafts/{id}", { path: { id: this.id } });
      if (same([theirs.name, theirs.config, theirs.datasets], [this.name, this.config, this.datasets])) {
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

  settle(take: boolean): void {
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

  /** What another tab saved while nothing was changed here. */
  async look(): Promise<void> {
    if (this.#dirty || this.#running !== null || this.theirs !== null) return;
    try {
      const now = await api.get("/api/v1/drafts/{id}", { path: { id: this.id } });
      if (now.version > this.version && !this.#dirty) this.#adopt(now);
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // the next save says so
    }
  }

  #adopt(draft: Draft): void {
    this.#draft = draft;
    this.#dirty = false;
    this.refused = [];
    this.name = draft.name;
    this.config = draft.config;
    this.datasets = draft.datasets;
    this.saving = "saved";
    this.check();
  }

  /** The page goes away: what is left is sent without waiting for the answer. */
  leave(): void {
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
