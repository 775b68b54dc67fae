/** Short messages. All disappear by themselves, an error later; not while the pointer or the focus is on them. */
import { ApiError } from "./api";
import { i18n } from "./i18n.svelte";

export interface Toast {
  id: number;
  kind: "success" | "error";
  text: string;
  /** A button of the message, such as an undo. */
  action?: { label: string; run: () => unknown };
}

const SHOWN_MS = { success: 5000, error: 12_000 };
const ACTION_MS = 12_000;

class Toasts {
  shown = $state.raw<Toast[]>([]);
  #next = 1;
  readonly #timers = new Map<number, number>();

  success(text: string, action?: Toast["action"]): void {
    this.#add("success", text, action);
  }

  error(text: string): void {
    if (!this.shown.some((toast) => toast.text === text)) this.#add("error", text);
  }

  close(id: number): void {
    this.hold(id);
    this.shown = this.shown.filter((toast) => toast.id !== id);
  }

  /** Keep a message in view. */
  hold(id: number): void {
    clearTimeout(this.#timers.get(id));
    this.#timers.delete(id);
  }

  /** Let a message disappear after its time. */
  release(toast: Toast): void {
    this.hold(toast.id);
    const shown_ms = toast.action === undefined ? SHOWN_MS[toast.kind] : ACTION_MS;
    this.#timers.set(toast.id, window.setTimeout(() => this.close(toast.id), shown_ms));
  }

  #add(kind: Toast["kind"], text: string, action?: Toast["action"]): void {
    const toast: Toast = { id: this.#next++, kind, text, action };
    this.shown = [...this.shown.slice(-2), toast];
    this.release(toast);
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
