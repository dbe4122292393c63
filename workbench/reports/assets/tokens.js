// The token view: words of a prompt; the chosen word shades those that one head attends to (or is attended from).
(() => {
  const { data, make, shade, visible, quoted } = report;
  const views = [];

  // weights come as the lower triangle in 16-bit steps
  function unpack(text, count) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const steps = new DataView(bytes.buffer);
    const rows = [];
    for (let row = 0, at = 0; row < count; row += 1) {
      rows.push(Array.from({ length: row + 1 }, () => steps.getUint16(2 * at++, true) / 65535));
    }
    return rows;
  }

  class TokenView {
    constructor(root) {
      this.root = root;
      this.words = root.querySelector(".words");
      this.says = root.querySelector(".says");
      this.arcs = root.querySelector(".arcs");
      this.locked = false;
      this.incoming = false;
      this.words.addEventListener("pointerover", (event) => this.point(event.target));
      this.words.addEventListener("pointerleave", () => this.rest());
      this.words.addEventListener("click", (event) => this.lock(event.target));
      this.words.addEventListener("keydown", (event) => this.key(event));
      this.words.addEventListener("focusin", (event) => this.point(event.target));
      this.show(root.dataset.pattern);
      views.push(this);
    }

    show(key) {
      this.pattern = data.patterns[key];
      this.tokens = data.tokens[this.pattern.example];
      this.rows = unpack(this.pattern.weights, this.tokens.length);
      this.home = this.pattern.start;
      this.locked = false;
      this.spans = report.setWords(this.words, this.tokens);
      this.select(this.home);
    }

    indexOf(target) {
      const word = target.closest?.(".word");
      return word ? Number(word.dataset.index) : null;
    }

    point(target) {
      const index = this.indexOf(target);
      if (index !== null && !this.locked) this.select(index);
    }

    rest() {
      if (!this.locked && !this.words.contains(document.activeElement)) this.select(this.home);
    }

    lock(target) {
      const index = this.indexOf(target);
      if (index === null) return;
      const again = this.locked && index === this.query;
      this.locked = !again;
      this.home = index;
      this.select(index);
    }

    key(event) {
      const move = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
      if (move !== undefined) {
        const next = Math.max(0, Math.min(this.tokens.length - 1, this.query + move));
        this.locked = false;
        this.select(next);
        this.spans[next].focus();
      } else if (event.key === "Enter" || event.key === " ") this.lock(event.target);
      else if (event.key === "Escape") this.locked = false;
      else return;
      event.preventDefault();
    }

    // attention between the chosen word and word `other`; null where the mask forbids it
    weight(other) {
      const [row, column] = this.incoming ? [other, this.query] : [this.query, other];
      return column <= row ? this.rows[row][column] : null;
    }

    select(index) {
      this.query = index;
      this.spans.forEach((word, other) => this.paint(word, other));
      this.tell();
      this.drawArcs();
    }

    paint(word, other) {
      const weight = this.weight(other);
      const first = other === 0 || (this.incoming && this.query === 0);
      word.tabIndex = other === this.query ? 0 : -1;
      word.setAttribute("aria-pressed", String(other === this.query && this.locked));
      word.classList.toggle("query", other === this.query);
      word.classList.toggle("masked", weight === null);
      word.classList.toggle("first", other === 0);
      const share = weight === null ? 0 : weight / this.pattern.top;
      const paint = weight === null || first || share < 0.02 ? { back: "", ink: "" } : shade(share);
      word.style.background = paint.back;
      word.style.color = paint.ink;
      word.title = weight === null ? "" : `${quoted(this.tokens[other])} ${weight.toFixed(3)}`;
      // position 0 has a line of its own instead of a colour
      word.style.setProperty("--mass", other === 0 && weight !== null ? weight.toFixed(3) : 0);
    }

    strongest(count) {
      return this.spans
        .map((_, other) => ({ other, weight: this.weight(other) ?? 0 }))
        .filter((entry) => entry.other !== 0 && entry.weight >= 0.02)
        .sort((a, b) => b.weight - a.weight)
        .slice(0, count);
    }

    tell() {
      const parts = this.strongest(3).flatMap((e, place) => [
        place ? ", " : "",
        make("bdi", {}, quoted(this.tokens[e.other])),
        ` ${e.weight.toFixed(2)}`,
      ]);
      const verb = this.incoming ? "is attended to by" : "attends to";
      const sink = this.weight(0);
      const rest = sink === null ? "" : ` · first token ${sink.toFixed(2)}`;
      this.says.replaceChildren(
        make("strong", {}, quoted(this.tokens[this.query])),
        ` at position ${this.query} ${verb} `,
        ...(parts.length ? parts : ["no other token above 0.02"]),
        rest,
      );
      this.root.classList.toggle("locked", this.locked);
    }

    drawArcs() {
      if (!this.arcs) return;
      this.arcs.replaceChildren();
      if (this.root.dataset.arcs !== "on") return;
      const frame = this.arcs.getBoundingClientRect();
      const middle = (word) => {
        const box = word.getBoundingClientRect();
        return [box.left + box.width / 2 - frame.left, box.top - frame.top];
      };
      const [x, y] = middle(this.spans[this.query]);
      for (const { other, weight } of this.strongest(4)) {
        if (other === this.query) continue;
        const [u, v] = middle(this.spans[other]);
        const lift = Math.min(y, v) - Math.min(26, 8 + Math.abs(x - u) / 14);
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        path.setAttribute("d", `M${x} ${y} C${x} ${lift} ${u} ${lift} ${u} ${v}`);
        path.setAttribute("stroke-width", (0.8 + 2.6 * weight).toFixed(2));
        path.setAttribute("stroke-opacity", Math.min(1, 0.25 + weight).toFixed(2));
        this.arcs.append(path);
      }
    }
  }

  for (const root of document.querySelectorAll(".tokens[data-pattern]")) new TokenView(root);

  // the large view has a choice of heads, a direction and a pattern map
  const explorer = document.getElementById("explorer");
  const main = views.find((view) => explorer?.contains(view.root));
  if (main) {
    const choice = explorer.querySelector("select");
    const map = explorer.querySelector(".canvas");
    report.showPattern = (key) => {
      choice.value = key;
      main.show(key);
      if (map) report.showFigure(map, `pattern-${key}`);
      const example = choice.selectedOptions[0];
      explorer.querySelector(".example").textContent = example.dataset.caption;
    };
    choice.addEventListener("change", () => report.showPattern(choice.value));
    explorer.querySelector("#incoming").addEventListener("change", (event) => {
      main.incoming = event.target.checked;
      main.select(main.query);
    });
    explorer.querySelector("#arcs").addEventListener("change", (event) => {
      main.root.dataset.arcs = event.target.checked ? "on" : "off";
      main.drawArcs();
    });
    for (const link of document.querySelectorAll("a[data-open-pattern]")) {
      link.addEventListener("click", () => report.showPattern(link.dataset.openPattern));
    }
  }

  const repaint = () => views.forEach((view) => view.select(view.query));
  document.addEventListener("themechange", repaint);
  window.addEventListener("resize", () => views.forEach((view) => view.drawArcs()));
})();
