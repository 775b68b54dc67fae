import type { Texts } from "../../lib/i18n.svelte";

export const runs: Texts["runs"] = {
  title: "Entrenamientos",
  start: "Nuevo entrenamiento",
  search: "Buscar por nombre",
  nothing: "Ningún entrenamiento coincide con ese nombre.",
  progress: "Progreso",
  loss: "Pérdida",
  steps: (step, total) => `${step} de ${total} pasos`,
  left: (time) => `faltan ${time}`,
  empty: {
    title: "Todavía no hay entrenamientos",
    text: "Añade de 10 a 50 imágenes de lo que el modelo debe aprender y prepara un entrenamiento. Antes de empezar verás cuánta memoria y cuánto tiempo necesita, y una prueba (dry run) con el modelo diminuto incluido tarda cerca de un minuto.",
    images: "1. Añadir imágenes",
    start: "2. Preparar un entrenamiento",
  },
  queue: {
    title: "Cola",
    paused: "La cola está en pausa: no empieza ningún entrenamiento nuevo. Los que están en marcha continúan.",
    pause: "Pausar la cola",
    resume: "Reanudar la cola",
    continueOnError: "Continuar si un entrenamiento falla",
    dryRun: "prueba",
    gpus: (count) => `${count} GPU`,
    allGpus: "todas las GPU",
    earlier: (name) => `Subir ${name}`,
    later: (name) => `Bajar ${name}`,
    remove: "Quitar",
    empty: "La cola está vacía.",
  },
};
