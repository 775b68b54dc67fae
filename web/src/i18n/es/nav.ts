import type { Words } from "../../lib/i18n.svelte";

export const nav: Words["nav"] = {
  label: "Páginas",
  skip: "Ir al contenido",
  runs: "Entrenamientos",
  newRun: "Nuevo",
  datasets: "Datos",
  system: "Sistema",
  language: "Idioma",
  theme: "Colores",
  themes: { system: "Del sistema", light: "Claro", dark: "Oscuro" },
  connected: "En directo",
  connecting: "Conectando…",
  lost: "Sin conexión",
};
