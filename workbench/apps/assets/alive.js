// Says so where the server does not answer what a page asks: a page that only waits would look as if work went on.
(function () {
  const PATIENCE = 15000;
  const words = "The server does not answer; it may have ended. What is shown may be old. Its terminal has the reason.";
  const ask = window.fetch.bind(window);
  let leaving = false;
  addEventListener("pagehide", () => (leaving = true));
  function tell(silent) {
    let box = document.getElementById("silent");
    if (!box) {
      box = document.createElement("div");
      box.id = "silent";
      box.setAttribute("role", "alert");
      document.body.append(box);
    }
    box.hidden = !silent;
    if (box.textContent !== (silent ? words : "")) box.textContent = silent ? words : "";
  }
  window.fetch = async function (what, ...more) {
    const asked = String(what && what.url ? what.url : what);
    if (!asked.includes("_dash-update-component")) return ask(what, ...more);
    const late = setTimeout(tell, PATIENCE, true);
    try {
      const answer = await ask(what, ...more);
      tell(false);
      return answer;
    } catch (error) {
      if (!leaving && error.name !== "AbortError") tell(true);
      throw error;
    } finally {
      clearTimeout(late);
    }
  };
})();
