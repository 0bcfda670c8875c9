// Checks an AsyncAPI document: node parse.mjs TOOLS FILE. Prints each error; the exit code is 1 if there is one.
// The parser does not compare the examples of messages with their schemas; its dependency ajv does.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [tools, file] = process.argv.slice(2);
const require = createRequire(join(tools, "package.json"));
const { Parser } = require("@asyncapi/parser");
const { default: Ajv } = require("ajv");

const text = readFileSync(file, "utf8");
const { document, diagnostics } = await new Parser().parse(text);
const errors = diagnostics.filter((each) => each.severity === 0).map((each) => `${each.path.join("/")}: ${each.message}`);
if (document !== undefined) {
  const { components } = JSON.parse(text);
  for (const [name, message] of Object.entries(components.messages)) {
    const ajv = new Ajv({ strict: false, validateFormats: false });
    const check = ajv.compile({ components, ...message.payload });
    for (const { payload } of message.examples ?? []) {
      if (!check(payload)) errors.push(`${name}: ${ajv.errorsText(check.errors)}: ${JSON.stringify(payload)}`);
    }
  }
} else if (errors.length === 0) errors.push("no document");
for (const each of errors) console.log(each);
process.exitCode = errors.length ? 1 : 0;
