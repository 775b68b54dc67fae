import type { Texts } from "../../lib/i18n.svelte";

export const runPrompts: Texts["runPrompts"] = {
  title: "Prompts de validación",
  help: "Los cambios se usan desde la próxima validación, y también después de reanudar. Las imágenes de pasos anteriores se conservan.",
  save: "Usar desde la próxima validación",
  discard: "Descartar los cambios",
  saved: "Los prompts se usan desde la próxima validación.",
  pending: "A la espera de la próxima validación.",
  none: "Un entrenamiento que genera imágenes necesita al menos un prompt.",
};
