/** Short messages: a success disappears by itself, an error stays until it is closed. */
import { ApiError } from "./api";
import { i18n } from "./i18n.svelte";

export interface Toast {
  id: number;
  kind: "success" | "error";
  text: string;
}

class Toasts {
  shown = $state.raw<Toast[]>([]);
  #next = 1;

  success(text: string): void {
    const id = this.#add("success", text);
    setTimeout(() => this.close(id), 5000);
  }

  error(text: string): void {
    if (!this.shown.some((toast) => toast.text === text)) this.#add("error", text);
  }

  close(id: number): void {
    this.shown = this.shown.filter((toast) => toast.id !== id);
  }

  #add(kind: Toast["kind"], text: string): number {
    const id = this.#next++;
    this.shown = [...this.shown.slice(-3), { id, kind, text }];
    return id;
  }
}

export const toasts = new Toasts();

/** The message for a failed request; other errors are thrown again. */
export function explain(error: unknown): string {
  if (!(error instanceof ApiError)) throw error;
  const t = i18n.t.errors;
  if (error.status === 0) return t.unreachable;
  if (error.status === 401) return t.loginNeeded;
  return error.message || t.refused(error.status);
}

/** Run `work`; a failed request is shown as a toast and returns null. Other errors are bugs and are thrown. */
export async function attempt<T>(work: () => Promise<T>): Promise<T | null> {
  try {
    return await work();
  } catch (error) {
    toasts.error(explain(error));
    return null;
  }
}
