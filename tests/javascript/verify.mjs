// Judges messages as a subscriber would: a JSON list of
//   {"with": "standardwebhooks" | "svix" | "ed25519", "key", "headers", "body": base64}
// on stdin; on stdout a list of true, or the reason of the refusal.
import { createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";
import * as standardwebhooks from "standardwebhooks";
import * as svix from "svix";

const libraries = { standardwebhooks, svix };

function ed25519(key, headers, body) {
  const x = Buffer.from(key.replace(/^whpk_/, ""), "base64").toString("base64url");
  const publicKey = createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x }, format: "jwk" });
  const text = Buffer.concat([Buffer.from(`${headers["webhook-id"]}.${headers["webhook-timestamp"]}.`), body]);
  const good = headers["webhook-signature"]
    .split(" ")
    .filter((entry) => entry.startsWith("v1a,"))
    .some((entry) => verify(null, text, publicKey, Buffer.from(entry.slice(4), "base64")));
  if (!good) throw new Error("No matching signature found");
}

function judge(message) {
  const body = Buffer.from(message.body, "base64");
  try {
    if (message.with === "ed25519") ed25519(message.key, message.headers, body);
    else new libraries[message.with].Webhook(message.key).verify(body, message.headers);
    return true;
  } catch (error) {
    return error.message;
  }
}

process.stdout.write(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(judge)));
