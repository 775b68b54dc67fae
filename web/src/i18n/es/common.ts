import type { Words } from "../../lib/i18n.svelte";

export const common: Words["common"] = {
  states: {
    draft: "Borrador",
    queued: "En cola",
    starting: "Arrancando",
    caching: "Preparando",
    running: "En marcha",
    stopping: "Deteniéndose",
    stopped: "Detenido",
    failed: "Falló",
    done: "Terminado",
    lost: "Interrumpido",
  },
  close: "Cerrar",
  cancel: "Cancelar",
  save: "Guardar",
  download: "Descargar",
  loading: "Cargando…",
  none: "ninguno",
  yes: "sí",
  no: "no",
  login: {
    title: "Escribe el token",
    text: "A este servidor se puede llegar desde otras máquinas, por eso pregunta quién eres. El token apareció en su terminal al arrancar.",
    token: "Token",
    enter: "Entrar",
  },
};
