import type { Words } from "../../lib/i18n.svelte";

export const errors: Words["errors"] = {
  unreachable: "El servidor no responde. ¿Sigue en marcha? Los entrenamientos continúan sin él.",
  loginNeeded: "Este servidor pide su token.",
  refused: (status) => `El servidor rechazó la petición (${status}).`,
};
