import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// assetsInlineLimit 0: the server's content security policy allows data: URLs for images only.
// The development server forwards /api and keeps the Host header, so that Origin and Host agree.
export default defineConfig({
  plugins: [svelte({ configFile: false })],
  base: "./",
  build: { target: "es2022", assetsInlineLimit: 0, modulePreload: { polyfill: false } },
  server: {
    host: "127.0.0.1",
    proxy: { "/api": { target: "http://127.0.0.1:8001", ws: true, changeOrigin: false } },
  },
});
