// Shared by the other scripts of a report: its data, colours, small helpers. Texts enter the page as text only.
"use strict";

const report = (() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  const mode = () => document.documentElement.dataset.theme || (system.matches ? "dark" : "light");

  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  // colour of a share 0..1 on the sequential scale of the current mode, and an ink that reads on it
  function shade(share) {
    const scale = data.palettes[mode()].scale;
    const place = Math.max(0, Math.min(1, share)) * (scale.length - 1);
    const low = Math.floor(place);
    const [from, to] = [channels(scale[low]), channels(scale[Math.min(low + 1, scale.length - 1)])];
    const mixed = from.map((value, i) => Math.round(value + (to[i] - value) * (place - low)));
    const bright = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2];
    return { back: `rgb(${mixed.join(",")})`, ink: bright > 140 ? "#10161c" : "#ffffff" };
  }

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") element.className = value;
      else if (name in element && name !== "role") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // what prints nothing becomes a sign or an escape; letters of any script stay
  const escaped = (letter) => {
    const code = letter.codePointAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  };
  const visible = (text) =>
    text
      .replaceAll("\n", "↵")
      .replaceAll("\t", "⇥")
      .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, escaped) || "∅";
  const quoted = (text) => `“${visible(text.trim() || text)}”`;

  // the tokens of a prompt as words that can be pointed at; returns their elements
  function setWords(root, tokens) {
    root.replaceChildren(
      ...tokens.flatMap((text, index) => {
        // a leading space stays outside, so that only the word itself is shaded
        const gap = text.length > 1 && text.startsWith(" ") ? " " : "";
        const word = make("span", { class: "word", role: "button", tabIndex: -1 }, visible(text.slice(gap.length)));
        word.dataset.index = index;
        return text.includes("\n") ? [gap, word, make("br")] : [gap, word];
      }),
    );
    return [...root.querySelectorAll(".word")];
  }

  const parseHead = (text) => {
    const match = /^#?L(\d+)H(\d+)$/i.exec(String(text));
    return match ? `L${Number(match[1])}H${Number(match[2])}` : null;
  };

  function number(value, digits = 2) {
    if (value === null || value === undefined) return "–";
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }

  const probability = (value) =>
    value === null || value === undefined ? "–" : value < 0.001 ? "<0.001" : value.toFixed(value < 0.01 ? 3 : 2);

  return { data, mode, shade, make, visible, quoted, setWords, parseHead, number, probability, system };
})();
