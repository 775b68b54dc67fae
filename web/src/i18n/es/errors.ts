import type { Texts } from "../../lib/i18n.svelte";

export const errors: Texts["errors"] = {
  unreachable: "El servidor no responde. Comprueba que esté en marcha. Los entrenamientos continúan sin él.",
  loginNeeded: "Este servidor requiere un token.",
  refused: (status) => `El servidor rechazó la petición (${status}).`,
};
