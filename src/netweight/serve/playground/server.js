// Requests to this server. The key is kept in this variable and nowhere else.

let key = "";

export const useKey = (given) => { key = given.trim(); };
export const hasKey = () => key !== "";

// A request that was not answered: the code and detail of problem+json, seconds to wait where the server names them.
export class Refused extends Error {
  constructor(code, detail, wait = 0) {
    super(detail);
    this.code = code;
    this.wait = wait;
  }
}

export async function request(path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Refused("unreachable", "");
  }
  if (response.ok) return response;
  let said = {};
  try {
    said = await response.json();
  } catch { /* not from Netweight: a proxy between */ }
  throw new Refused(said.code ?? "", said.detail ?? `HTTP ${response.status}`, Number(response.headers.get("Retry-After")) || 0);
}

export const model = (name, verb) => `v1/models/${encodeURIComponent(name)}/${verb}`;
