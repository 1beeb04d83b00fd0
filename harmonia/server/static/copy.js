// Adds a button to each snippet, which copies its text. Without JavaScript, pages have no button.
// Browsers offer navigator.clipboard only over https. Over http, the script copies a selection instead.
for (const snippet of document.querySelectorAll(".snippet")) {
  const [caption, text] = snippet.children;
  const button = document.createElement("button");
  const status = document.createElement("span");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + caption.textContent);
  status.className = "hidden";
  status.setAttribute("role", "status");
  caption.after(button, status);
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    status.textContent = button.textContent;
    setTimeout(() => { button.textContent = "Copy"; status.textContent = ""; }, 2000);
  });
}
