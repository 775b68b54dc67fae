import type { Texts } from "../../lib/i18n.svelte";

export const usage: Texts["usage"] = {
  title: "Carga de este equipo",
  cpu: "CPU",
  memory: "Memoria en uso",
  disk: "Lecturas y escrituras del disco",
  read: "Leído",
  write: "Escrito",
  diskFree: "Libre en el disco del espacio de trabajo",
  load: "Carga de la GPU",
  temperature: "Temperatura",
  power: "Potencia",
  minutes: "Minutos",
  none: "No se registró nada en ese tiempo. El servidor registra mientras hay un trabajo en marcha o esta página está abierta.",
};
