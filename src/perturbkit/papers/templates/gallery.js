(() => {
  const form = document.getElementById("filters");
  const field = document.getElementById("words");
  const choices = [...form.querySelectorAll("select")];
  const cards = [...document.querySelectorAll(".card")].map((node) => ({ node, text: node.textContent.toLowerCase() }));
  const apply = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { node, text } of cards) {
      const kept = words.every((word) => text.includes(word)) && choices.every((choice) => {
        const own = (node.dataset[choice.dataset.field] || "").split(" ");
        return !choice.value || own.includes(choice.value) || (choice.dataset.field === "input" && own.includes("any"));
      });
      node.hidden = !kept;
      count += kept;
    }
    document.getElementById("count").textContent = `${count} of ${cards.length}`;
    document.getElementById("nothing").hidden = count > 0 || cards.length === 0;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("beforeprint", () => document.querySelectorAll("img").forEach((image) => { image.loading = "eager"; }));
  apply();
})();
