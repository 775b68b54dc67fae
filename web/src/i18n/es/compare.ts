import type { Texts } from "../../lib/i18n.svelte";

export const compare: Texts["compare"] = {
  title: "Comparar entrenamientos",
  perMinute: "por minutos de entrenamiento",
  heldOut: "Pérdida en datos reservados",
  heldOutChange: "Cambio de la pérdida reservada",
  settings: "Ajustes distintos",
  noDifference: "Estos entrenamientos tienen los mismos ajustes.",
  scores: "Pérdida reservada y puntuaciones, con su error estándar",
  score: "Puntuación",
  images: "Mismos prompts",
  noImages: "Ningún prompt en común",
  noImagesHelp: "Se muestran lado a lado donde hay imágenes de validación del mismo prompt, tamaño y semilla.",
};
