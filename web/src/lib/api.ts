/** The server's routes with their types: `api.get("/api/v1/runs/{id}", { path: { id } })`. */
import type { ErrorDetail, paths } from "./types";

type Method = "get" | "post" | "put" | "delete";
type Operation = { responses: Record<number, unknown> };
type Route<M extends Method> = {
  [P in keyof paths]: paths[P][M] extends Operation ? P : never;
}[keyof paths];
type Op<P extends keyof paths, M extends Method> = Extract<paths[P][M], Operation>;

type Part<O, K extends string> = O extends { parameters: infer Q }
  ? Q extends { [X in K]: infer T }
    ? { [X in K]: T }
    : Q extends { [X in K]?: infer T }
      ? { [X in K]?: T }
      : unknown
  : unknown;
type Body<O> = O extends { requestBody: { content: { "application/json": infer B } } } ? { body: B } : unknown;
type Ask<O> = Part<O, "path"> & Part<O, "query"> & Body<O>;
/** Nothing to say may be left out. */
type Rest<A> = Record<never, never> extends A ? [ask?: A] : [ask: A];

type Json<R> = R extends { content: { "application/json": infer B } } ? B : undefined;
type Answer<O> = O extends { responses: infer R }
  ? R extends { 200: infer A }
    ? Json<A>
    : R extends { 201: infer A }
      ? Json<A>
      : undefined
  : never;

/** An answer that is no success. status 0: the server was not reached. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    readonly detail: ErrorDetail[],
  ) {
    super(detail.map((one) => (one.loc ? `${one.loc}: ${one.message}` : one.message)).join("\n"));
  }
}

/** Whether the server may answer the same question later. */
export function isUnreached(error: unknown): boolean {
  return error instanceof Refused && error.status === 0;
}

interface Loose {
  path?: Record<string, unknown>;
  query?: Record<string, unknown>;
  body?: unknown;
}

/** Address of a route, for pictures and downloads too. Parameter "path" keeps its slashes. */
export function url(route: keyof paths, path: object = {}, query: object = {}): string {
  const values = path as Record<string, unknown>;
  const filled = route.slice(1).replace(/\{(\w+)\}/g, (_, name: string) => {
    const value = String(values[name]);
    return name === "path" ? value.split("/").map(encodeURIComponent).join("/") : encodeURIComponent(value);
  });
  const address = new URL(filled, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null) address.searchParams.set(name, String(value));
  }
  return address.pathname + address.search;
}

export async function refusal(response: Response): Promise<Refused> {
  let detail: ErrorDetail[] = [];
  try {
    const body: unknown = await response.json();
    if (typeof body === "object" && body !== null && "detail" in body && Array.isArray(body.detail)) {
      detail = body.detail as ErrorDetail[];
    }
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // a proxy's page is no JSON
  }
  if (response.status === 401 && !location.hash.startsWith("#/login")) location.hash = "#/login";
  return new Refused(response.status, detail);
}

async function call(method: Method, route: keyof paths, ask: Loose): Promise<unknown> {
  const init: RequestInit = { method: method.toUpperCase(), credentials: "same-origin" };
  if (method !== "get") init.headers = { "content-type": "application/json" };
  if (ask.body !== undefined) init.body = JSON.stringify(ask.body);
  try {
    const response = await fetch(url(route, ask.path, ask.query), init);
    if (!response.ok) throw await refusal(response);
    return response.status === 204 ? undefined : await response.json();
  } catch (error) {
    if (error instanceof Refused) throw error;
    throw new Refused(0, []); // also one that was cut off in the middle
  }
}

export const api = {
  get: <P extends Route<"get">>(route: P, ...[ask]: Rest<Ask<Op<P, "get">>>) =>
    call("get", route, (ask ?? {}) as Loose) as Promise<Answer<Op<P, "get">>>,
  post: <P extends Route<"post">>(route: P, ...[ask]: Rest<Ask<Op<P, "post">>>) =>
    call("post", route, (ask ?? {}) as Loose) as Promise<Answer<Op<P, "post">>>,
  put: <P extends Route<"put">>(route: P, ...[ask]: Rest<Ask<Op<P, "put">>>) =>
    call("put", route, (ask ?? {}) as Loose) as Promise<Answer<Op<P, "put">>>,
  delete: <P extends Route<"delete">>(route: P, ...[ask]: Rest<Ask<Op<P, "delete">>>) =>
    call("delete", route, (ask ?? {}) as Loose) as Promise<Answer<Op<P, "delete">>>,
};
