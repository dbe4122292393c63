// Token by token: heads of a short prompt side by side, chosen from small maps, sharing the token that is pointed at.
(function () {
  const { Card, Weights, make, exact, shades, following } = window.workbenchTokens;
  const MOST_HEADS = 6;
  const ARCS = [["0", "off"], ["0.02", "above 0.02"], ["0.05", "above 0.05"], ["0.1", "above 0.1"], ["0.3", "above 0.3"]];
  const SHOWS = [["both", "both"], ["back", "what it looks at"], ["forth", "what looks at it"]];
  const SCALES = [["root", "square root"], ["linear", "linear"]];
  const DEFAULTS = { arcs: "0.05", show: "both", scale: "root" };
  // Heads that were looked at last go along to the next prompt.
  let lastHeads = [];

  class View {
    constructor(box) {
      this.box = box;
      this.part = (name) => box.querySelector(".tok-" + name);
      this.source = box.dataset.source;
      this.cards = new Map();
      this.kept = new Map();
      this.hover = this.locked = this.pair = this.home = null;
      this.tip = make("div", { class: "tok-tip", role: "tooltip", hidden: true });
      box.append(this.tip);
      this.ask("about").then((answer) => answer.json()).then((about) => this.begin(about)).catch((error) => this.say(error.message));
    }

    async ask(path, more) {
      const answer = await fetch("/tokens/" + path + this.source + (more || ""));
      if (answer.ok) return answer;
      const found = await answer.json().catch(() => ({}));
      throw new Error(found.error || answer.statusText);
    }

    say(text) { this.part("told").textContent = text; }

    weights(name) {
      if (!this.kept.has(name)) {
        const reach = this.about.windows[/^L(\d+)/.exec(name)[1]];
        const asked = this.ask("weights", "&head=" + name).then((answer) => answer.arrayBuffer())
          .then((buffer) => new Weights(buffer, this.about.tokens.length, reach));
        asked.catch(() => this.kept.delete(name));
        this.kept.set(name, asked);
        if (this.kept.size > 24) this.kept.delete(this.kept.keys().next().value);
      }
      return this.kept.get(name);
    }

    begin(about) {
      this.about = about;
      const from = new URLSearchParams(location.search), known = new Set(about.heads);
      const asked = (from.get("heads") || "").split(",").filter((name) => known.has(name));
      // An address that names one head's pattern means that one.
      const last = from.has("pattern") ? [] : lastHeads.filter((name) => known.has(name));
      const heads = asked.length ? asked : last.length ? last : [about.start];
      const at = from.get("at"), pick = (name, options) => (options.some(([value]) => value === from.get(name)) ? from.get(name) : DEFAULTS[name]);
      this.locked = at !== null && /^\d+$/.test(at) && Number(at) < about.tokens.length ? Number(at) : null;
      this.first = from.get("first") === "1";
      this.maps = from.get("maps") !== "0";
      this.arcs = Number(pick("arcs", ARCS));
      this.direction = pick("show", SHOWS);
      this.scale = pick("scale", SCALES);
      this.buildControls();
      this.buildGallery();
      [...new Set(heads)].slice(0, MOST_HEADS).forEach((name) => this.add(name));
      this.listen();
      this.changed();
      if (this.locked !== null) this.tellLock();
    }

    buildControls() {
      const select = (name, label, options, value, set) => {
        const found = make("select", { class: "tok-opt-" + name }, ...options.map(([key, text]) => new Option(text, key)));
        found.value = String(value);
        found.addEventListener("change", () => { set(found.value); this.changed(); });
        return make("label", {}, label + " ", found);
      };
      const check = (name, label, value, set) => {
        const found = make("input", { class: "tok-opt-" + name, type: "checkbox", checked: value });
        found.addEventListener("change", () => { set(found.checked); this.changed(); });
        return make("label", {}, found, " " + label);
      };
      this.part("controls").replaceChildren(
        make("span", { class: "tok-key back" }, "looks at"), make("span", { class: "tok-key forth" }, "is looked at by"),
        select("show", "Show", SHOWS, this.direction, (value) => { this.direction = value; }),
        select("arcs", "Arcs", ARCS, this.arcs, (value) => { this.arcs = Number(value); }),
        select("scale", "Scale", SCALES, this.scale, (value) => { this.scale = value; }),
        check("first", "position 0 within the range", this.first, (value) => { this.first = value; }),
        check("maps", "maps", this.maps, (value) => { this.maps = value; })
      );
    }

    // Small maps: layers by heads where the pattern has (nearly) all of them, else one after the other.
    buildGallery() {
      const heads = this.about.heads, gallery = this.part("gallery");
      gallery.hidden = heads.length < 2;
      const layers = new Map();
      for (const name of heads) {
        const [, layer, head] = /^L(\d+)H(\d+)$/.exec(name).map(Number);
        if (!layers.has(layer)) layers.set(layer, []);
        layers.get(layer).push({ name, head });
      }
      const wide = 1 + Math.max(...heads.map((name) => Number(/H(\d+)$/.exec(name)[1])));
      const grid = layers.size > 1 && heads.length > 0.6 * wide * layers.size;
      const thumb = ({ name }) => {
        const found = make("button", { class: "tok-thumb", type: "button", tabIndex: -1, title: name, "aria-label": name }, make("img", { alt: "" }));
        if (!grid) found.append(make("span", {}, name));
        found.dataset.head = name;
        return found;
      };
      const rows = [...layers].map(([layer, each]) => make("div", { class: "tok-row" },
        ...(grid ? [make("span", { class: "tok-layer" }, "L" + layer)] : []), ...each.map(thumb)));
      const set = make("button", { class: "export tok-set", type: "button", title: "Show the heads of the set that you chose in the atlas" }, "My set");
      set.addEventListener("click", () => this.showSet());
      const words = make("p", { class: "caption" }, `${heads.length} heads: choose up to ${MOST_HEADS} to see side by side. `
        + "Each small map has colours of its own.");
      this.wall = make("div", { class: "tok-wall" + (grid ? "" : " flow") + (grid && wide <= 12 ? " pairs" : ""), role: "group", "aria-label": "Heads" }, ...rows);
      this.wall.style.setProperty("--across", wide);
      gallery.replaceChildren(make("div", { class: "tok-choice" }, words, set), this.wall);
      this.thumbs = [...this.wall.querySelectorAll(".tok-thumb")];
      this.thumbs[0].tabIndex = 0;
      this.small = new Map();
      this.lazy = new IntersectionObserver((seen) => {
        for (const one of seen) if (one.isIntersecting) {
          this.lazy.unobserve(one.target);
          this.drawThumb(one.target);
        }
      }, { root: null, rootMargin: "100px" });
      this.thumbs.forEach((one) => this.lazy.observe(one));
    }

    // A layer's pictures come in one answer.
    drawThumb(button) {
      const name = button.dataset.head, layer = /^L(\d+)/.exec(name)[1];
      if (!this.small.has(layer)) this.small.set(layer, this.ask("small", "&layer=" + layer).then((answer) => answer.arrayBuffer()));
      this.small.get(layer).then((buffer) => {
        const side = Math.ceil(this.about.tokens.length / this.about.cell);
        const place = this.about.heads.filter((one) => one.startsWith(`L${layer}H`)).indexOf(name);
        const bytes = new Uint8Array(buffer, place * side * side, side * side);
        const canvas = make("canvas", { width: side, height: side });
        const pen = canvas.getContext("2d"), image = pen.createImageData(side, side);
        this.colours = this.colours || shades();
        for (let row = 0; row < side; row++) for (let key = 0; key <= row; key++) {
          image.data.set([...this.colours[bytes[row * side + key]], 255], 4 * (row * side + key));
        }
        pen.putImageData(image, 0, 0);
        button.querySelector("img").src = canvas.toDataURL();
        button.dataset.drawn = "yes";
      }).catch((error) => this.say(error.message));
    }

    listen() {
      this.wall.addEventListener("click", (event) => {
        const thumb = event.target.closest(".tok-thumb");
        if (thumb) this.toggle(thumb.dataset.head);
      });
      this.wall.addEventListener("focusin", (event) => {
        for (const one of this.thumbs) one.tabIndex = one === event.target ? 0 : -1;
      });
      this.wall.addEventListener("keydown", (event) => {
        const from = this.thumbs.indexOf(event.target);
        const next = from < 0 ? null : following(this.thumbs, from, event.key);
        if (next === null) return;
        this.thumbs[next].focus();
        event.preventDefault();
      });
      // Wherever the focus is, but for fields that have a use for it.
      this.escape = (event) => {
        if (event.key !== "Escape" || event.target.matches("input, textarea, select")) return;
        this.tip.hidden = true;
        if (this.locked !== null) this.lock(this.locked);
      };
      document.addEventListener("keydown", this.escape);
      // Its height follows from what is told of a token, and changes nothing.
      this.size = new ResizeObserver(([one]) => {
        if (one.contentRect.width === this.width) return;
        this.width = one.contentRect.width;
        this.cards.forEach((card) => card.remeasure());
        this.draw();
      });
      this.size.observe(this.part("cards"));
      this.scheme = new MutationObserver(() => {
        this.colours = null;
        this.thumbs.forEach((one) => { if (one.dataset.drawn) this.drawThumb(one); });
        this.cards.forEach((card) => card.repaint());
      });
      this.scheme.observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
    }

    showSet() {
      let set = [];
      try { set = JSON.parse(localStorage.getItem("head-set") || "[]"); } catch (error) { set = []; }
      const known = new Set(this.about.heads), heads = (Array.isArray(set) ? set : []).filter((name) => known.has(name)).slice(0, MOST_HEADS);
      if (!heads.length) return this.say("No head of your set is here; choose heads in the atlas first.");
      for (const name of [...this.cards.keys()]) if (!heads.includes(name)) this.drop(name);
      heads.forEach((name) => { if (!this.cards.has(name)) this.add(name); });
      this.changed();
    }

    toggle(name) {
      if (this.cards.has(name)) {
        if (this.cards.size === 1) return this.say("One head stays; choose another one first.");
        this.drop(name);
      } else if (this.cards.size >= MOST_HEADS) return this.say(`${MOST_HEADS} heads are shown at most; remove one first.`);
      else this.add(name);
      this.say("");
      this.changed();
    }

    add(name) {
      const card = new Card(this, name);
      this.cards.set(name, card);
      this.part("cards").append(card.box);
    }

    drop(name) {
      this.cards.get(name).box.remove();
      this.cards.delete(name);
    }

    arrived(card) {
      if (this.home === null) this.home = card.weights.telling();
      card.show(this.focus());
      this.box.dataset.ready = [...this.cards.values()].every((one) => one.weights) ? "yes" : "no";
      this.draw();
    }

    shows(direction) { return this.direction === "both" || this.direction === direction; }

    focus() { return this.locked !== null ? this.locked : this.hover !== null ? this.hover : this.home || 0; }

    plain(at) { return this.about.tokens[at].replace(/^␣(?=[^␣…])/, ""); }

    // Text and position; the text may run from right to left, the rest does not.
    word(at) { return ["“", make("bdi", { class: "tok-quote" }, this.plain(at)), `” (${at})`]; }

    point(at, element, card) {
      this.hover = at;
      const lock = this.locked;
      this.pair = lock === null || lock === at ? null : { row: Math.max(lock, at), key: Math.min(lock, at) };
      this.draw();
      if (!card.weights) return;
      const box = element.getBoundingClientRect();
      const words = this.pair ? card.pairWords(this.pair, card.weights.at(this.pair.row, this.pair.key)) : card.most(at);
      this.showTip(words, box.left, box.bottom + 6);
    }

    pointCell(row, key, event, card) {
      this.hover = row;
      this.pair = { row, key };
      this.draw();
      this.showTip(card.pairWords(this.pair, card.weights.at(row, key)), event.clientX + 14, event.clientY + 14);
    }

    showTip(words, left, top) {
      this.tip.replaceChildren(...words);
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, high = this.tip.offsetHeight;
      this.tip.style.left = Math.max(4, Math.min(left, window.innerWidth - wide - 8)) + "px";
      this.tip.style.top = Math.min(top, window.innerHeight - high - 8) + "px";
    }

    leave() {
      this.tip.hidden = true;
      if (this.pair === null) return;
      this.pair = null;
      this.draw();
    }

    lock(at) {
      this.locked = this.locked === at ? null : at;
      this.hover = at;
      this.pair = null;
      this.tellLock();
      if (this.locked !== null) this.cards.forEach((card) => card.show(at));
      this.changed(false);
    }

    tellLock() { this.say(this.locked === null ? "" : `Locked at position ${this.locked}: ${this.about.tokens[this.locked]}`); }

    draw() {
      if (this.due) return;
      this.due = requestAnimationFrame(() => { this.due = null; this.cards.forEach((card) => card.paint()); });
    }

    // Other heads or options: everything is drawn anew, and the address follows.
    changed(whole = true) {
      lastHeads = [...this.cards.keys()];
      this.part("cards").classList.toggle("alone", this.cards.size === 1);
      this.part("cards").classList.toggle("arcless", !this.arcs);
      this.box.dataset.ready = [...this.cards.values()].every((one) => one.weights) ? "yes" : "no";
      this.thumbs.forEach((one) => one.setAttribute("aria-pressed", String(this.cards.has(one.dataset.head))));
      if (whole) this.cards.forEach((card) => card.repaint()); else this.draw();
      this.remember();
    }

    remember() {
      const fields = new URLSearchParams(location.search), own = new URLSearchParams(this.source);
      if (!this.box.isConnected || ["run", "job"].some((name) => (own.get(name) || "") !== (fields.get(name) || ""))) return;
      const note = (name, value, usual) => { if (value === usual) fields.delete(name); else fields.set(name, value); };
      note("heads", [...this.cards.keys()].join(","), "");
      note("at", this.locked === null ? "" : String(this.locked), "");
      note("first", this.first ? "1" : "", "");
      note("maps", this.maps ? "" : "0", "");
      note("arcs", String(this.arcs), DEFAULTS.arcs);
      note("show", this.direction, DEFAULTS.show);
      note("scale", this.scale, DEFAULTS.scale);
      history.replaceState(history.state, "", location.pathname + "?" + fields);
    }

    end() {
      document.removeEventListener("keydown", this.escape);
      for (const one of [this.size, this.scheme, this.lazy]) one && one.disconnect();
    }
  }

  const views = new Map();
  function mount() {
    for (const [box, view] of views) if (!document.contains(box)) { view.end(); views.delete(box); }
    for (const box of document.querySelectorAll(".tokens-view")) if (!views.has(box)) views.set(box, new View(box));
  }
  new MutationObserver(mount).observe(document, { childList: true, subtree: true });
})();
