import type { Texts } from "../../lib/i18n.svelte";

export const firstVisit: Texts["firstVisit"] = {
  lead: "Tres pasos hasta la primera LoRA. Nada se entrena antes de pulsar Iniciar, y todo se puede cambiar después.",
  images: "Imágenes",
  imagesHelp: "De 10 a 50 imágenes de lo que el modelo debe aprender, cada una con su descripción. O pruebe con dieciséis dibujos de un zorbo, una forma que ningún modelo conoce.",
  add: "Añadir imágenes",
  sample: "Usar las imágenes de muestra",
  dataset: "Dataset",
  count: "{n} {n|imagen|imágenes}, {captioned} con descripción",
  addMore: "Añadir otras imágenes",
  teach: "Qué enseñar",
  teachHelp: "Una palabra que lo nombra en descripciones y prompts: rara, para que aún no signifique otra cosa.",
  trigger: "Palabra de activación",
  start: "Iniciar",
  noGpu: "No se encontró ninguna GPU",
  nano: "El modelo diminuto incluido (chroma-nano) aprende aquí en minutos, a 128 px.",
  preset: "El ajuste {name} cabe en esta máquina.",
  nothingFits: "Ningún ajuste cabe en la memoria de esta GPU; elija los valores usted mismo.",
  setUp: "Preparar el entrenamiento",
  self: "Elegirlo todo yo",
};
