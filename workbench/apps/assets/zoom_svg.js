// A pen that takes the strokes of a canvas, those that the zoomable pattern makes, and keeps them as SVG.
(function () {
  const short = (value) => String(Math.round(value * 100) / 100);
  const escaped = (text) => String(text).replace(/[&<>"']/g, (one) => "&#" + one.charCodeAt(0) + ";");
  const ANCHORS = { left: "start", center: "middle", right: "end" };

  window.workbenchSvgPen = class {
    constructor(width, height, ground) {
      this.size = [width, height];
      this.parts = [];
      this.open = [];
      this.clips = 0;
      Object.assign(this, { fillStyle: "#000", strokeStyle: "#000", globalAlpha: 1, lineWidth: 1, textAlign: "left", font: "11px sans-serif" });
      this.beginPath();
      this.put("rect", { x: 0, y: 0, width, height, fill: ground });
    }

    put(kind, fields, inside) {
      const list = Object.entries(fields).map(([name, value]) => ` ${name}="${typeof value === "number" ? short(value) : escaped(value)}"`);
      this.parts.push(`<${kind}${list.join("")}` + (inside === undefined ? "/>" : `>${inside}</${kind}>`));
    }

    // Groups stay open until what was saved is restored.
    group(field) { this.parts.push(`<g ${field}>`); if (this.open.length) this.open[this.open.length - 1].groups++; }
    save() {
      const { fillStyle, strokeStyle, globalAlpha, lineWidth, textAlign, font } = this;
      this.open.push({ groups: 0, style: { fillStyle, strokeStyle, globalAlpha, lineWidth, textAlign, font } });
    }
    restore() {
      const last = this.open.pop();
      this.parts.push("</g>".repeat(last.groups));
      Object.assign(this, last.style);
    }
    translate(x, y) { this.group(`transform="translate(${short(x)} ${short(y)})"`); }
    rotate(angle) { this.group(`transform="rotate(${short((angle * 180) / Math.PI)})"`); }

    beginPath() { this.path = ""; this.box = null; }
    moveTo(x, y) { this.path += `M${short(x)} ${short(y)}`; }
    lineTo(x, y) { this.path += `L${short(x)} ${short(y)}`; }
    rect(x, y, width, height) { this.box = { x, y, width, height }; }
    clip() {
      const name = "part-" + ++this.clips, { x, y, width, height } = this.box;
      this.parts.push(`<clipPath id="${name}"><rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}"/></clipPath>`);
      this.group(`clip-path="url(#${name})"`);
    }
    stroke() {
      this.put("path", { d: this.path, fill: "none", stroke: this.strokeStyle, "stroke-width": this.lineWidth, opacity: this.globalAlpha });
    }
    fillRect(x, y, width, height) {
      this.put("rect", { x, y, width, height, fill: this.fillStyle, opacity: this.globalAlpha });
    }
    fillText(text, x, y) {
      const [size, ...family] = this.font.split(" ");
      const style = { "font-size": size, "font-family": family.join(" "), "text-anchor": ANCHORS[this.textAlign] };
      this.put("text", { x, y, fill: this.fillStyle, ...style }, escaped(text));
    }
    drawPicture(address, x, y, width, height) {
      this.put("image", { x, y, width, height, preserveAspectRatio: "none", href: address });
    }

    text(title) {
      const [width, height] = this.size.map(short);
      return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"><title>${escaped(title)}</title>${this.parts.join("\n")}</svg>`;
    }
  };
})();
