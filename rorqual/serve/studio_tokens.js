// A text as tokens one can choose: click, or arrow keys, Home and End. The chosen token and its selected ones are marked.
export default {
  template: `
    <div class="tokens" role="listbox" tabindex="0" :aria-label="label" :aria-activedescendant="name(chosen)"
         @keydown="move" @click="pick">
      <span v-for="(text, i) in texts" :key="i" :id="name(i)" role="option" :data-at="i" :aria-selected="i === chosen"
            :class="look(i)" :style="{'--share': shares[i] || 0}">{{ shown(text) }}</span>
    </div>`,
  props: { texts: Array, label: String },
  data: () => ({ chosen: -1, shares: [] }),
  methods: {
    name(i) { return `${this.$.uid}-token-${i}`; },
    shown(text) { return text.replace(/\n/g, "⏎\n") || "∅"; },
    look(i) {
      return { token: true, chosen: i === this.chosen, selected: (this.shares[i] || 0) > 0, later: this.chosen >= 0 && i > this.chosen };
    },
    mark(chosen, shares) {
      this.chosen = chosen;
      this.shares = shares;
      this.$nextTick(() => this.$el.querySelector(".chosen")?.scrollIntoView({ block: "nearest" }));
    },
    choose(i) {
      const at = Math.max(0, Math.min(this.texts.length - 1, i));
      if (at !== this.chosen) this.$emit("choose", at);
    },
    pick(event) {
      const at = event.target.closest("[data-at]")?.dataset.at;
      if (at !== undefined) this.choose(Number(at));
    },
    move(event) {
      const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -1e9, End: 1e9 };
      if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.choose(this.chosen + steps[event.key]);
    },
  },
};
