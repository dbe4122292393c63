// Light and dark: follows the system until the reader chooses. Others listen to the "themechange" event.
(() => {
  const button = document.getElementById("theme");

  function tell() {
    const dark = report.mode() === "dark";
    button.setAttribute("aria-pressed", String(dark));
    button.title = dark ? "Switch to light" : "Switch to dark";
    document.dispatchEvent(new Event("themechange"));
  }

  button.addEventListener("click", () => {
    const next = report.mode() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("workbench-theme", next);
    } catch (error) {
      // the choice then lasts as long as the page
    }
    tell();
  });
  report.system.addEventListener("change", tell);

  // paper is white: print in light colours and come back
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme || "";
    document.querySelectorAll("details").forEach((part) => (part.open = true));
    document.documentElement.dataset.theme = "light";
    tell();
  });
  window.addEventListener("afterprint", () => {
    if (before === null) return;
    if (before) document.documentElement.dataset.theme = before;
    else delete document.documentElement.dataset.theme;
    before = null;
    tell();
  });
  tell();
})();
