import type { Words } from "../../lib/i18n.svelte";

export const runs: Words["runs"] = {
  title: "Entrenamientos",
};
