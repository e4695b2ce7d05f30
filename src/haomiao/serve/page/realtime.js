// The connection: /v1/realtime, opened again when it is lost. Sends events; tells what came as DOM events of its own.

const WAITS = [300, 1000, 2000, 5000];

export class Realtime extends EventTarget {
  #socket = null;
  #tries = 0;
  key = "";

  async connect() {
    const state = await this.#probe();
    if (state === "ready") this.#open();
    else if (state === "key") this.#tell("key");
    else this.#again(state);
  }

  get open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  send(type, fields = {}) {
    if (this.open) this.#socket.send(JSON.stringify({ type, ...fields }));
    return this.open;
  }

  headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  // A refused handshake of a WebSocket tells a page nothing; plain requests say why.
  async #probe() {
    try {
      const ready = await fetch("/ready");
      if (!ready.ok) return { loading: (await ready.json()).loading ?? {} };
      const models = await fetch("/v1/models", { headers: this.headers() });
      return models.status === 401 ? "key" : models.ok ? "ready" : { loading: {} };
    } catch {
      return { lost: true };
    }
  }

  #open() {
    const url = new URL("/v1/realtime", location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const protocols = this.key ? ["realtime", `openai-insecure-api-key.${this.key}`] : ["realtime"];
    const socket = (this.#socket = new WebSocket(url, protocols));
    socket.onopen = () => { this.#tries = 0; };
    socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      this.#tell(event.type, event);
    };
    socket.onclose = () => {
      if (this.#socket === socket) this.#again({ lost: true });
    };
  }

  #again(state) {
    this.#tell("waiting", state);
    const wait = WAITS[Math.min(this.#tries++, WAITS.length - 1)];
    setTimeout(() => this.connect(), state.lost ? wait : 500);
  }

  #tell(type, detail = {}) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
