// Runs before the page is painted: a mode chosen earlier is set at once, so that nothing flashes.
(() => {
  try {
    const chosen = localStorage.getItem("workbench-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch (error) {
    // storage may be forbidden for local files; the system's preference holds then
  }
})();
