import type { Texts } from "../lib/i18n.svelte";
import { common } from "./es/common";
import { datasets } from "./es/datasets";
import { errors } from "./es/errors";
import { nav } from "./es/nav";
import { newRun } from "./es/newRun";
import { run } from "./es/run";
import { runs } from "./es/runs";
import { system } from "./es/system";

export const es: Texts = { common, datasets, errors, nav, newRun, run, runs, system };
