// The zoomable pattern: a map of N x N entries as tiles from the server, with exact values under the pointer.
(function () {
  const LEFT = 128, TOP = 74, STRIP = 24, KEEP = 400, WAIT = 40;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => document.documentElement.getAttribute("data-mantine-color-scheme") === "dark";
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const shown = (value) => (value >= 0.01 ? value.toFixed(3) : value.toExponential(2));

  class Viewer {
    constructor(box) {
      this.box = box;
      this.stage = box.querySelector(".zoom-stage");
      this.told = box.querySelector(".zoom-told");
      this.base = "/zoom/" + encodeURIComponent(box.dataset.run) + "/" + encodeURIComponent(box.dataset.pattern);
      this.canvas = document.createElement("canvas");
      this.stage.appendChild(this.canvas);
      this.build();
      this.tiles = new Map();
      this.strips = {};
      this.place = null;
      this.asked = 0;
      this.ask("about").then((about) => this.begin(about)).catch((error) => this.say(error.message));
    }

    // Controls are made here: they are read and written many times a second, and belong to no one else.
    build() {
      const make = (kind, name, fields, ...inside) => {
        const found = Object.assign(document.createElement(kind), fields || {});
        if (name) found.className = "zoom-" + name + (kind === "button" ? " export" : "");
        found.append(...inside);
        return found;
      };
      const select = (name, options) => make("select", name, {}, ...options.map(([value, text]) => new Option(text, value)));
      const number = (name, value, low, high, step) => make("input", name, { type: "number", value, min: low, max: high, step });
      const button = (name, text) => make("button", name, { type: "button" }, text);
      const label = (...inside) => make("label", "", {}, ...inside);
      this.box.querySelector(".zoom-controls").replaceChildren(
        label("Cells show ", select("how", [["max", "maximum"], ["mean", "mean"]])),
        label("Scale ", select("scale", [["log", "logarithmic"], ["linear", "linear"]])),
        make("span", "legend", {}, make("span", "low"), make("span", "bar"), make("span", "top")),
        label("Ends at ", make("input", "top-range", { type: "range", min: -4, max: 0, step: 0.02 })),
        label("Row ", number("row", "", 0, "", 1)), label("key ", number("key", "", 0, "", 1)), button("go", "Go"),
        label("Entries above ", number("above", 0.3, 0.0001, 1, 0.05)), button("next", "Next"),
        label(make("input", "first", { type: "checkbox" }), " key 0 too (in the search and in the colours' range)"),
        button("home", "Whole"), button("png", "PNG"), button("svg", "SVG"), button("csv", "CSV")
      );
    }

    async ask(path, signal) {
      const answer = await fetch(this.base + "/" + path, { signal });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error || answer.statusText);
      return found;
    }

    say(text) { this.told.textContent = text; }

    begin(about) {
      this.about = about;
      const from = new URLSearchParams(location.search);
      this.control("how").value = from.get("how") === "mean" ? "mean" : "max";
      this.control("scale").value = from.get("scale") === "linear" ? "linear" : "log";
      this.control("first").checked = from.get("first") === "1";
      const top = Number(from.get("top"));
      this.top = top > about.floor && top <= 1 ? top : null;
      this.listen();
      this.resize();
      const span = Number(from.get("span"));
      if (span > 0 && span <= 4 * about.tokens) {
        this.view = { x: Number(from.get("key")) || 0, y: Number(from.get("row")) || 0, size: span / this.width };
        this.hold();
      } else this.whole();
      this.draw();
    }

    control(name) { return this.box.querySelector(".zoom-" + name); }

    listen() {
      this.watch = new ResizeObserver(() => { this.resize(); this.draw(); });
      this.watch.observe(this.stage);
      this.scheme = new MutationObserver(() => { this.tiles.clear(); this.draw(); });
      this.scheme.observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
      const canvas = this.canvas;
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.zoom(Math.exp(clamp(event.deltaY, -200, 200) / 260), event.offsetX, event.offsetY);
      }, { passive: false });
      canvas.addEventListener("pointerdown", (event) => {
        this.drag = { x: event.clientX, y: event.clientY, view: { ...this.view } };
        canvas.setPointerCapture(event.pointerId);
        this.stage.focus({ preventScroll: true });
      });
      canvas.addEventListener("pointerup", () => { this.drag = null; });
      canvas.addEventListener("pointerleave", () => { if (!this.drag) { this.pointer = null; this.draw(); } });
      canvas.addEventListener("pointermove", (event) => this.move(event));
      this.stage.addEventListener("keydown", (event) => this.key(event));
      for (const name of ["how", "scale"]) this.control(name).addEventListener("change", () => {
        if (name === "how") this.top = null;
        this.tiles.clear();
        this.draw();
      });
      this.control("first").addEventListener("change", () => { this.tiles.clear(); this.draw(); });
      this.control("top-range").addEventListener("input", (event) => {
        this.top = Math.max(Math.pow(10, Number(event.target.value)), this.about.floor * 10);
        this.tiles.clear();
        this.draw();
      });
      this.control("go").addEventListener("click", () => this.go());
      this.control("next").addEventListener("click", () => this.next());
      this.control("home").addEventListener("click", () => { this.whole(); this.draw(); });
      for (const kind of ["png", "svg", "csv"]) this.control(kind).addEventListener("click", () => this.save(kind));
    }

    resize() {
      const ratio = window.devicePixelRatio || 1;
      const wide = Math.max(360, this.stage.clientWidth), high = Math.max(320, this.stage.clientHeight);
      this.canvas.width = wide * ratio;
      this.canvas.height = high * ratio;
      this.canvas.style.width = wide + "px";
      this.canvas.style.height = high + "px";
      this.width = wide - LEFT;
      this.height = high - TOP;
      this.ratio = ratio;
      if (this.view) this.hold();
    }

    // view.x, view.y: the key and the row at the upper left; view.size: tokens a pixel.
    whole() {
      const size = this.about.tokens / Math.min(this.width, this.height);
      this.view = { x: 0, y: 0, size };
      this.hold();
    }

    hold() {
      const tokens = this.about.tokens, most = tokens / Math.min(this.width, this.height);
      const view = this.view;
      view.size = clamp(view.size, Math.min(1 / 24, most), most);
      view.x = clamp(view.x, 0, Math.max(0, tokens - this.width * view.size));
      view.y = clamp(view.y, 0, Math.max(0, tokens - this.height * view.size));
    }

    zoom(factor, px, py) {
      const view = this.view;
      const x = view.x + (px - LEFT) * view.size, y = view.y + (py - TOP) * view.size;
      view.size *= factor;
      this.hold();
      view.x = x - (px - LEFT) * view.size;
      view.y = y - (py - TOP) * view.size;
      this.hold();
      this.draw();
    }

    centre(row, key, size, before) {
      this.view.size = size;
      this.hold();
      this.view.x = key - (this.width * this.view.size) / 2;
      this.view.y = row - (this.height * this.view.size) / 2;
      this.hold();
      this.place = { row, key };
      this.draw();
      this.tell(row, key, before);
    }

    move(event) {
      if (this.drag) {
        this.view.x = this.drag.view.x - (event.clientX - this.drag.x) * this.view.size;
        this.view.y = this.drag.view.y - (event.clientY - this.drag.y) * this.view.size;
        this.hold();
        this.draw();
        return;
      }
      const key = Math.floor(this.view.x + (event.offsetX - LEFT) * this.view.size);
      const row = Math.floor(this.view.y + (event.offsetY - TOP) * this.view.size);
      const inside = event.offsetX >= LEFT && event.offsetY >= TOP && key < this.about.tokens && row < this.about.tokens;
      this.pointer = inside && key >= 0 && row >= 0 ? { row, key } : null;
      this.draw();
      if (this.pointer) this.tell(row, key);
    }

    key(event) {
      const step = 64 * this.view.size;
      const middle = [LEFT + this.width / 2, TOP + this.height / 2];
      const act = {
        ArrowLeft: () => (this.view.x -= step), ArrowRight: () => (this.view.x += step),
        ArrowUp: () => (this.view.y -= step), ArrowDown: () => (this.view.y += step),
        "+": () => this.zoom(0.5, ...middle), "=": () => this.zoom(0.5, ...middle), "-": () => this.zoom(2, ...middle),
        Home: () => this.whole(), n: () => this.next(), N: () => this.next(),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
      this.hold();
      this.draw();
    }

    go() {
      const row = Math.round(Number(this.control("row").value)), key = Math.round(Number(this.control("key").value));
      const last = this.about.tokens - 1;
      if (!(row >= 0 && row <= last && key >= 0 && key <= last)) return this.say(`Rows and keys run from 0 to ${last}.`);
      this.centre(row, key, Math.min(this.view.size, 0.25));
    }

    // The rows and keys that are seen, whole or in part.
    part() {
      const ends = (from, pixels) => [Math.floor(from), Math.min(this.about.tokens, Math.ceil(from + pixels * this.view.size))];
      return { rows: ends(this.view.y, this.height), keys: ends(this.view.x, this.width) };
    }

    // Goes on behind the last place while that is in view, else from the view's upper left.
    async next() {
      const above = Number(this.control("above").value) || 0.3, first = this.control("first").checked;
      const { rows, keys } = this.part(), place = this.place;
      const seen = place && place.row >= rows[0] && place.row < rows[1] && place.key >= keys[0] && place.key < keys[1];
      const from = seen ? place : { row: rows[0], key: keys[0] };
      const without = first ? "" : "key 0 left out of the search; ";
      try {
        const { found, around } = await this.ask(
          `next?row=${from.row}&key=${from.key}&above=${above}&here=${seen ? 0 : 1}&first=${first ? 1 : 0}`
        );
        if (!found) return this.say(`No entry of ${above} or more${first ? "" : " (key 0 left out of the search)"}.`);
        const same = seen && found.row === place.row && found.key === place.key;
        const round = !around ? "" : same ? "the only one; " : "none below, round again from row 0; ";
        this.centre(found.row, found.key, Math.min(this.view.size, 0.25), round + without);
      } catch (error) { this.say(error.message); }
    }

    tell(row, key, before) {
      clearTimeout(this.later);
      this.later = setTimeout(async () => {
        if (this.ongoing) this.ongoing.abort();
        this.ongoing = new AbortController();
        try {
          const one = await this.ask(`value?row=${row}&key=${key}&level=${this.level()}`, this.ongoing.signal);
          const token = (list) => (list.length ? " " + JSON.stringify(list[0]) : "");
          const cell = one.cell > 1 ? `; cell of ${one.cell} x ${one.cell}: mean ${shown(one.mean)}, max ${shown(one.max)}` : "";
          const seen = key <= row ? shown(one.value) : "hidden by the mask";
          const after = before ? ` (${before.replace(/; $/, "")})` : "";
          this.say(`row ${row}${token(one.row_token)} to key ${key}${token(one.key_token)}: ${seen}${cell}; entropy of the row ${one.entropy.toFixed(2)} nats${after}`);
          this.told.dataset.value = one.value;
        } catch (error) { if (error.name !== "AbortError") this.say(error.message); }
      }, WAIT);
    }

    level() { return clamp(Math.round(Math.log2(this.view.size)), 0, this.about.levels); }

    limit() {
      const scale = this.control("scale").value, how = this.control("how").value;
      const tops = this.control("first").checked ? this.about.tops_with_first : this.about.tops;
      return this.top || (scale === "log" ? 1 : tops[how]);
    }

    query() {
      const how = this.control("how").value, scale = this.control("scale").value;
      return `how=${how}&scale=${scale}&top=${this.limit()}&dark=${dark() ? 1 : 0}`;
    }

    tile(level, row, column) {
      const name = level + "/" + row + "/" + column;
      let found = this.tiles.get(name);
      if (!found) {
        const image = new Image();
        found = { image, ready: false };
        image.onload = () => { found.ready = true; this.draw(); };
        image.onerror = () => { found.failed = true; this.draw(); };
        image.src = `${this.base}/tile/${name}.png?${this.query()}`;
        this.tiles.set(name, found);
        if (this.tiles.size > KEEP) this.tiles.delete(this.tiles.keys().next().value);
      }
      return found;
    }

    draw() {
      if (this.due) return;
      this.due = requestAnimationFrame(() => { this.due = null; this.paint(); });
    }

    paint() {
      if (!this.view) return;
      const pen = this.canvas.getContext("2d");
      pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      pen.clearRect(0, 0, this.width + LEFT, this.height + TOP);
      const waiting = this.paintAll(pen, (own) => this.paintTiles(own));
      this.control("low").textContent = this.control("scale").value === "log" ? this.about.floor.toExponential(0) : "0";
      this.control("top").textContent = shown(this.limit());
      this.control("top-range").value = Math.log10(this.limit());
      this.stage.dataset.ready = waiting ? "no" : "yes";
      this.stage.dataset.level = this.level();
      this.remember();
    }

    // The whole figure with any pen that draws as a canvas does; `map` draws the cells.
    paintAll(pen, map) {
      pen.save();
      pen.beginPath();
      pen.rect(LEFT, TOP, this.width, this.height);
      pen.clip();
      pen.fillStyle = css("--sunken");
      pen.fillRect(LEFT, TOP, this.width, this.height);
      const waiting = map(pen);
      this.paintSpans(pen);
      this.paintCross(pen);
      pen.restore();
      this.paintAxes(pen);
      this.paintStrips(pen);
      return waiting;
    }

    paintTiles(pen) {
      const view = this.view, level = this.level(), pixels = this.about.pixels;
      let waiting = 0;
      const each = (at, use) => {
        const span = pixels << at, last = Math.ceil(this.about.tokens / span) - 1;
        const rows = [Math.floor(view.y / span), Math.min(last, Math.floor((view.y + this.height * view.size) / span))];
        const columns = [Math.floor(view.x / span), Math.min(last, Math.floor((view.x + this.width * view.size) / span))];
        for (let row = rows[0]; row <= rows[1]; row++) for (let column = columns[0]; column <= columns[1]; column++) {
          // All keys of such a tile are after all of its rows.
          if (column > row) continue;
          use(row, column, span);
        }
      };
      const put = (image, row, column, span) => {
        pen.imageSmoothingEnabled = view.size > (span / pixels);
        const x = LEFT + (column * span - view.x) / view.size, y = TOP + (row * span - view.y) / view.size;
        const side = span / view.size;
        pen.drawImage(image, Math.floor(x), Math.floor(y), Math.ceil(side) + 1, Math.ceil(side) + 1);
      };
      // What is there already of coarser levels stands until the finer tiles have come.
      for (let at = Math.min(this.about.levels, level + 4); at > level; at--) each(at, (row, column, span) => {
        const found = this.tiles.get(at + "/" + row + "/" + column);
        if (found && found.ready) put(found.image, row, column, span);
      });
      each(level, (row, column, span) => {
        const found = this.tile(level, row, column);
        if (found.ready) {
          // Coarse cells beneath would shine through where the mask hides finer ones.
          const side = span / view.size;
          pen.fillStyle = css("--sunken");
          pen.fillRect(LEFT + (column * span - view.x) / view.size, TOP + (row * span - view.y) / view.size, side, side);
          put(found.image, row, column, span);
        } else if (!found.failed) waiting++;
      });
      return waiting;
    }

    paintSpans(pen) {
      for (const span of this.about.spans || []) {
        const first = Number(span.first), last = Number(span.last) + 1, view = this.view;
        if (!(last > first)) continue;
        pen.fillStyle = css("--effect");
        pen.globalAlpha = 0.16;
        pen.fillRect(LEFT + (first - view.x) / view.size, TOP, Math.max(1, (last - first) / view.size), this.height);
        pen.fillRect(LEFT, TOP + (first - view.y) / view.size, this.width, Math.max(1, (last - first) / view.size));
        pen.globalAlpha = 1;
      }
    }

    paintCross(pen) {
      const at = this.pointer || this.place;
      if (!at) return;
      const x = LEFT + (at.key + 0.5 - this.view.x) / this.view.size, y = TOP + (at.row + 0.5 - this.view.y) / this.view.size;
      pen.strokeStyle = css("--effect");
      pen.globalAlpha = this.pointer ? 0.6 : 0.9;
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(LEFT, y); pen.lineTo(LEFT + this.width, y);
      pen.moveTo(x, TOP); pen.lineTo(x, TOP + this.height);
      pen.stroke();
      pen.globalAlpha = 1;
    }

    ticks(from, pixels) {
      const span = pixels * this.view.size, power = Math.pow(10, Math.floor(Math.log10(span / 6)));
      const step = Math.max(1, [1, 2, 5, 10].map((one) => one * power).find((one) => span / one <= 8) || 10 * power);
      const found = [];
      for (let at = Math.ceil(from / step) * step; at <= from + span && at < this.about.tokens; at += step) found.push(Math.round(at));
      return found;
    }

    paintAxes(pen) {
      pen.fillStyle = css("--muted");
      pen.font = '11px "Segoe UI", Inter, Roboto, sans-serif';
      pen.textAlign = "center";
      for (const at of this.ticks(this.view.x, this.width)) {
        const x = LEFT + (at - this.view.x) / this.view.size;
        pen.fillText(at.toLocaleString("en"), x, TOP - STRIP - 22);
        pen.fillRect(x, TOP - 4, 1, 4);
      }
      pen.textAlign = "right";
      for (const at of this.ticks(this.view.y, this.height)) {
        const y = TOP + (at - this.view.y) / this.view.size;
        pen.fillText(at.toLocaleString("en"), LEFT - 2 * STRIP - 10, y + 4);
        pen.fillRect(LEFT - 4, y, 4, 1);
      }
      pen.textAlign = "left";
      pen.fillText("key (source)", LEFT, 11);
      pen.save();
      pen.translate(10, TOP + 4);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "right";
      pen.fillText("query (destination)", 0, 0);
      pen.restore();
    }

    paintStrips(pen) {
      const view = this.view, { rows, keys: columns } = this.part();
      const draw = (name, text, range, along) => {
        if (!this.about.strips.includes(name) || range[1] <= range[0]) return;
        const pixels = along === "x" ? this.width : this.height;
        const values = this.stripValues(name, range, Math.ceil(pixels / 2));
        if (!values) return;
        // Position 0 is left out of the range here as well, unless it is asked for.
        const most = Math.max(...values.slice(range[0] === 0 && !this.control("first").checked ? 1 : 0), 1e-9);
        pen.fillStyle = css("--accent");
        const step = (range[1] - range[0]) / values.length / view.size;
        values.forEach((value, i) => {
          const size = clamp(value / most, 0, 1) * STRIP, at = i * step;
          if (along === "x") pen.fillRect(LEFT + (range[0] - view.x) / view.size + at, TOP - 6 - size, Math.max(1, step), size);
          else {
            const left = LEFT - 6 - (name === "entropy" ? 0 : STRIP + 2);
            pen.fillRect(left - size, TOP + (range[0] - view.y) / view.size + at, size, Math.max(1, step));
          }
        });
        pen.fillStyle = css("--muted");
        pen.font = '10px "Segoe UI", Inter, Roboto, sans-serif';
        pen.textAlign = "right";
        if (along === "x") pen.fillText(`${text}, up to ${shown(most)}`, LEFT + this.width, 11);
        else if (name === "entropy") pen.fillText(`entropy, up to ${shown(most)}`, LEFT - 6, TOP - 8);
        else pen.fillText(`key 0, up to ${shown(most)}`, LEFT - 6, TOP - 22);
      };
      draw("column_mean", "mean of the column", columns, "x");
      draw("entropy", "entropy", rows, "y");
      draw("sink", "mass on key 0", rows, "y");
    }

    stripValues(name, range, bins) {
      const wanted = `${range[0]}-${range[1]}-${bins}`;
      const kept = (this.strips[name] = this.strips[name] || {});
      if (kept.wanted !== wanted) {
        kept.wanted = wanted;
        clearTimeout(kept.timer);
        kept.timer = setTimeout(() => {
          this.ask(`strip/${name}?from=${range[0]}&to=${range[1]}&bins=${bins}`).then((found) => {
            if (kept.wanted === wanted) { kept.shown = wanted; kept.values = found.values; this.draw(); }
          }).catch((error) => this.say(error.message));
        }, 60);
      }
      return kept.shown === wanted ? kept.values : null;
    }

    // The address follows the view, so that a link restores it.
    remember() {
      clearTimeout(this.noting);
      this.noting = setTimeout(() => {
        const fields = new URLSearchParams(location.search);
        if (!document.contains(this.box) || fields.get("run") !== this.box.dataset.run) return;
        const view = this.view;
        fields.set("row", view.y.toFixed(2));
        fields.set("key", view.x.toFixed(2));
        fields.set("span", (view.size * this.width).toFixed(3));
        fields.set("how", this.control("how").value);
        fields.set("scale", this.control("scale").value);
        if (this.control("first").checked) fields.set("first", "1"); else fields.delete("first");
        if (this.top) fields.set("top", this.top.toPrecision(4)); else fields.delete("top");
        history.replaceState(history.state, "", location.pathname + "?" + fields);
      }, 150);
    }

    async save(kind) {
      try {
        const { rows, keys } = this.part(), name = this.about.head + "-pattern." + kind;
        if (kind === "png") this.pixels().toBlob((blob) => this.keep(name, blob));
        else if (kind === "svg") this.keep(name, new Blob([this.vectors()], { type: "image/svg+xml" }));
        else {
          const how = this.control("how").value;
          const where = `rows_from=${rows[0]}&rows_to=${rows[1]}&keys_from=${keys[0]}&keys_to=${keys[1]}`;
          const answer = await fetch(`${this.base}/view.csv?${where}&how=${how}`);
          if (!answer.ok) throw new Error((await answer.json()).error || answer.statusText);
          this.keep(name, await answer.blob());
        }
      } catch (error) { this.say(error.message); }
    }

    keep(name, blob) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }

    pixels() {
      const copy = document.createElement("canvas");
      copy.width = this.canvas.width;
      copy.height = this.canvas.height;
      const pen = copy.getContext("2d");
      pen.fillStyle = css("--surface");
      pen.fillRect(0, 0, copy.width, copy.height);
      pen.drawImage(this.canvas, 0, 0);
      return copy;
    }

    // The cells as one picture; axes, strips, spans, labels as vectors.
    vectors() {
      const copy = document.createElement("canvas");
      copy.width = Math.round(this.width * this.ratio);
      copy.height = Math.round(this.height * this.ratio);
      const own = copy.getContext("2d");
      own.setTransform(this.ratio, 0, 0, this.ratio, -LEFT * this.ratio, -TOP * this.ratio);
      this.paintTiles(own);
      const pen = new window.workbenchSvgPen(this.width + LEFT, this.height + TOP, css("--surface"));
      this.paintAll(pen, () => pen.drawPicture(copy.toDataURL("image/png"), LEFT, TOP, this.width, this.height));
      const { rows, keys } = this.part();
      const text = (value) => value.toLocaleString("en");
      return pen.text(`Attention of ${this.about.head}, rows ${text(rows[0])} to ${text(rows[1] - 1)} (queries) to keys ${text(keys[0])} to ${text(keys[1] - 1)}`);
    }

    end() {
      this.watch && this.watch.disconnect();
      this.scheme && this.scheme.disconnect();
    }
  }

  const viewers = new Map();
  function mount() {
    for (const [box, viewer] of viewers) if (!document.contains(box)) { viewer.end(); viewers.delete(box); }
    for (const box of document.querySelectorAll(".zoom")) if (!viewers.has(box)) viewers.set(box, new Viewer(box));
  }
  new MutationObserver(mount).observe(document, { childList: true, subtree: true });
})();
