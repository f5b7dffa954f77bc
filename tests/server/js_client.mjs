// Draws with the official JavaScript client, unchanged; prints what came as one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any" });
const prompt = "a red cube on a blue cube";
const plain = await client.images.generate({ prompt, n: 2, response_format: "b64_json", seed: 3 });
const again = await client.images.generate({ prompt, n: 2, response_format: null, seed: 3 });
const events = [];
for await (const event of await client.images.generate({ prompt, stream: true, partial_images: 3, quality: "low" })) events.push(event.type);
let refused = null;
try {
  await client.images.generate({ prompt, sead: 3 });
} catch (error) {
  refused = { name: error.constructor.name, message: error.message, param: error.param, id: error.requestID };
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({ plain, again, events, refused, models }));
