/** Short messages that leave by themselves; what went wrong stays until it is closed. */
import { Refused } from "./api";
import { i18n } from "./i18n.svelte";

export interface Toast {
  id: number;
  kind: "done" | "bad";
  text: string;
}

class Toasts {
  shown = $state.raw<Toast[]>([]);
  #next = 1;

  done(text: string): void {
    const id = this.#add("done", text);
    setTimeout(() => this.close(id), 5000);
  }

  bad(text: string): void {
    if (!this.shown.some((one) => one.text === text)) this.#add("bad", text);
  }

  close(id: number): void {
    this.shown = this.shown.filter((one) => one.id !== id);
  }

  #add(kind: Toast["kind"], text: string): number {
    const id = this.#next++;
    this.shown = [...this.shown.slice(-3), { id, kind, text }];
    return id;
  }
}

export const toasts = new Toasts();

/** What a failed request says to a person. */
export function explain(error: unknown): string {
  if (!(error instanceof Refused)) throw error;
  const t = i18n.t.errors;
  if (error.status === 0) return t.unreachable;
  if (error.status === 401) return t.loginNeeded;
  return error.message || t.refused(error.status);
}

/** Do it; a refusal becomes a toast and null. Other errors are mistakes of this page and go on. */
export async function attempt<T>(work: () => Promise<T>): Promise<T | null> {
  try {
    return await work();
  } catch (error) {
    toasts.bad(explain(error));
    return null;
  }
}
