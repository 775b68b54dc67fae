import type { Texts } from "../../lib/i18n.svelte";

export const nav: Texts["nav"] = {
  label: "Páginas",
  skip: "Ir al contenido",
  runs: "Entrenamientos",
  newRun: "Nuevo",
  datasets: "Datasets",
  system: "Sistema",
  language: "Idioma",
  theme: "Tema",
  themes: { system: "Sistema", light: "Claro", dark: "Oscuro" },
  connected: "En directo",
  connecting: "Conectando…",
  lost: "Sin conexión",
  settings: "Ajustes",
};
