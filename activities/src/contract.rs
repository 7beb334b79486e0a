//! The contract of an activity from its Rust types: JSON Schemas by derive, and the one place where untyped
//! JSON becomes typed. It knows no activity by name.

use futures_util::future::BoxFuture;
use loopwright_engine::{Failure, activity::Context, signature::Signature};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::future::Future;

/// Start-to-close limit of one attempt where neither activity nor definition sets one: 20 minutes, in ms.
pub const RUN_TIMEOUT_MS: u64 = 20 * 60 * 1000;
/// Longest silence of an activity that reports progress: 2 minutes, in ms. A slow model streams for longer than one.
pub const HEARTBEAT_TIMEOUT_MS: u64 = 2 * 60 * 1000;

/// Failure codes of every activity that asks a model.
pub const MODEL_FAILURES: &[&str] = &[
    "model.refused",
    "model.output_invalid",
    "model.truncated",
    "model.context_overflow",
    "model.unavailable",
    "model.no_own_key",
    "model.unpriced",
    "model.too_dear",
    "provider.key_invalid",
    "provider.no_balance",
    "transient.network",
    "transient.http",
    "transient.rate_limited",
    "transient.unavailable",
];

/// JSON Schema of `T` as an activity accepts it: defaulted fields are optional. Subschemas are inlined, so that a
/// reader that follows a path through `properties` needs no `$ref`.
#[must_use]
pub fn input_schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().for_deserialize();
    schema::<T>(settings)
}

/// JSON Schema of `T` as an activity returns it: every field that is always written is required.
#[must_use]
pub fn output_schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    schema::<T>(settings)
}

fn schema<T: JsonSchema>(settings: SchemaSettings) -> Value {
    let settings = settings.with(|s| {
        s.inline_subschemas = true;
        s.meta_schema = None;
    });
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// A contract with the defaults of a metered activity that reports progress; set the public fields that differ.
///
/// # Shape
/// `name` is `implement@1`; both schemas come from the types.
/// # Units
/// [`RUN_TIMEOUT_MS`], [`HEARTBEAT_TIMEOUT_MS`].
#[must_use]
pub fn signature<I: JsonSchema, O: JsonSchema>(name: &str, summary: &str, failure_codes: &[&str]) -> Signature {
    Signature {
        name: name.to_owned(),
        summary: summary.to_owned(),
        input_schema: input_schema::<I>(),
        output_schema: output_schema::<O>(),
        run_timeout_ms: RUN_TIMEOUT_MS,
        heartbeat_timeout_ms: Some(HEARTBEAT_TIMEOUT_MS),
        metered: true,
        idempotent: true,
        failure_codes: std::iter::once("input.invalid")
            .chain(failure_codes.iter().copied())
            .map(str::to_owned)
            .collect(),
    }
}

/// Reads an activity's input.
///
/// # Errors
/// `input.invalid`, permanent, saying which field is wrong.
pub fn parse<I: DeserializeOwned>(input: Value) -> Result<I, Failure> {
    serde_json::from_value(input)
        .map_err(|error| Failure::permanent("input.invalid", format!("the input does not fit the contract: {error}")))
}

/// Writes an activity's output.
///
/// # Errors
/// `internal.output`, permanent: the type has no JSON form, which is our bug.
pub fn render<O: Serialize>(output: &O) -> Result<Value, Failure> {
    serde_json::to_value(output)
        .map_err(|error| Failure::permanent("internal.output", format!("the output has no JSON form: {error}")))
}

/// The body of `Activity::run` around typed work.
///
/// # Errors
/// Those of [`parse`], of `work`, of [`render`].
pub fn run<I, O, F, W>(ctx: Context, input: Value, work: F) -> BoxFuture<'static, Result<Value, Failure>>
where
    I: DeserializeOwned + Send + 'static,
    O: Serialize + Send + 'static,
    F: FnOnce(Context, I) -> W + Send + 'static,
    W: Future<Output = Result<O, Failure>> + Send + 'static,
{
    Box::pin(async move {
        let input = parse::<I>(input)?;
        let output = work(ctx, input).await?;
        render(&output)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use loopwright_engine::{FailureKind, activity::detached};
    use serde::Deserialize;
    use serde_json::json;
    use std::sync::Arc;

    #[derive(Deserialize, JsonSchema)]
    struct Input {
        words: Vec<Word>,
        #[serde(default)]
        times: u32,
    }
    #[derive(Deserialize, JsonSchema)]
    struct Word {
        text: String,
    }
    #[derive(Serialize, JsonSchema)]
    struct Output {
        text: String,
    }

    fn context() -> Context {
        detached::context(detached::info("echo@1", Value::Null), Default::default(), Arc::default())
    }

    #[test]
    fn schemas_are_inlined_and_defaults_optional() {
        let signature = signature::<Input, Output>("echo@1", "Repeats", &["model.refused"]);
        assert_eq!(signature.input_schema["required"], json!(["words"]));
        assert_eq!(signature.input_schema["properties"]["words"]["items"]["properties"]["text"]["type"], "string");
        assert!(signature.input_schema.get("$defs").is_none());
        assert_eq!(signature.output_schema["required"], json!(["text"]));
        assert_eq!(signature.failure_codes, ["input.invalid", "model.refused"]);
    }

    #[tokio::test]
    async fn typed_work_gets_typed_input_or_a_permanent_failure() {
        let work = |_: Context, input: Input| async move {
            let text: Vec<_> = input.words.into_iter().map(|w| w.text).collect();
            Ok(Output { text: text.join(" ").repeat(1 + input.times as usize) })
        };
        let out = run(context(), json!({"words": [{"text": "a"}, {"text": "b"}]}), work).await;
        assert_eq!(out, Ok(json!({"text": "a b"})));
        let failure = run(context(), json!({"words": 3}), work).await.expect_err("wrong type");
        assert_eq!((failure.kind, failure.code.as_str()), (FailureKind::Permanent, "input.invalid"));
        assert!(failure.message.contains("expected a sequence"), "{}", failure.message);
    }
}
