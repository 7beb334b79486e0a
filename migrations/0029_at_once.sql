-- What a model call costs us in round trips: its announcement and its end are one statement each in the ordinary case, and what an
-- announcement has to know in any other case is one question.
--
-- Statements inside these functions see, each by itself, what was committed before it began. That is why they are functions: in one
-- plain statement everything is as it was before the lock was waited for.
--
-- Forward only. The release before works on this schema and does not know these functions.
--
-- What an operator has to expect: functions alone, no table is locked.

-- Ids of the price rows of a model that are in force at an instant, the highest floor first: those of the model, else those of `in_any`.
-- Rows of `model_pricing` are never changed, so who knows the ids knows the prices.
create function prices_in_force(in_provider text, in_model text, in_any text, in_at timestamptz) returns bigint[]
language plpgsql stable as $$
declare ids bigint[];
begin
  select array_agg(p.id order by p.min_prompt_tokens desc) into ids
  from (select m.model_id, m.effective_from from model_pricing m
        where m.provider = in_provider and m.model_id in (in_model, in_any) and m.service_tier = 'standard' and m.effective_from <= in_at
        order by (m.model_id = in_model) desc, m.effective_from desc limit 1) newest
  join model_pricing p on p.model_id = newest.model_id and p.effective_from = newest.effective_from
  where p.provider = in_provider and p.service_tier = 'standard';
  return coalesce(ids, '{}');
end $$;

-- Announces a call, if there is nothing to decide: its attempt runs, it is new, its key may be used, the prices are those that its
-- worst case was computed with, and it fits into what the attempt holds. Otherwise nothing is done, and false.
create function call_announced(
  in_attempt uuid, in_key text, in_user uuid, in_project uuid, in_provider text, in_model text, in_any text, in_prices bigint[],
  in_pricing bigint, in_worst bigint, in_own uuid, in_fingerprint text, in_purpose text, in_sha256 text
) returns boolean language plpgsql as $$
declare
  used numeric; last_no int; known boolean;
  held bigint; rate bigint; markup int;
  key_row uuid;
begin
  perform from users u where u.id = in_user for no key update;
  if not found then return false; end if;
  perform from activity_attempts a where a.id = in_attempt and a.state = 'running';
  if not found then return false; end if;
  select coalesce(sum(case k.state when 'started' then k.worst_pusd else k.cost_pusd end), 0), coalesce(max(k.call_no), 0),
         coalesce(bool_or(k.call_key = in_key), false)
    into used, last_no, known from api_key_usage k where k.attempt_id = in_attempt;
  if known then return false; end if;
  if in_own is null then
    select k.id into key_row from api_keys k
      where k.provider = in_provider and k.fingerprint = decode(in_fingerprint, 'hex') and k.user_id is null;
    select sum(t.held_delta_ucr), (array_agg(t.rate_credits_per_usd order by t.hold_no))[1], (array_agg(t.markup_bps order by t.hold_no))[1]
      into held, rate, markup from credit_transactions t where t.attempt_id = in_attempt and t.kind = 'hold';
    -- Rounded up it would be as much or less: `held` is whole. Null: nothing is held.
    if held = 0 or ((used + in_worst) * rate * (10000 + markup) <= held * 10000000000::numeric) is not true then return false; end if;
  else
    select k.id into key_row from api_keys k
      where k.id = in_own and k.user_id = in_user and k.provider = in_provider and k.fingerprint = decode(in_fingerprint, 'hex')
        and k.source = 'sealed' and k.status <> 'revoked';
  end if;
  if key_row is null or prices_in_force(in_provider, in_model, in_any, engine_now()) <> in_prices then return false; end if;
  insert into api_key_usage (attempt_id, call_no, call_key, api_key_id, user_id, project_id, provider, model_requested, purpose,
                             request_sha256, state, pricing_id, worst_pusd)
    values (in_attempt, last_no + 1, in_key, key_row, in_user, in_project, in_provider, in_model, in_purpose,
            decode(in_sha256, 'hex'), 'started', in_pricing, in_worst);
  return true;
end $$;

-- All that a call's announcement has to know that needs a decision. Locks the user's row; without one there is no row.
create function call_facts(
  in_attempt uuid, in_key text, in_user uuid, in_provider text, in_model text, in_any text, in_own uuid, in_fingerprint text
)
returns table (
  balance bigint, held_of_user bigint, stopped boolean,       -- as `ledger::lock`
  expired bigint, moment timestamptz,                         -- what is over its date and not booked yet, and when that was so
  known text,                                                 -- state of the call of that key
  running boolean,                                            -- its attempt
  key_row uuid,                                               -- of a user's own key only if it is his and in use
  used text, held bigint, hold_no int, rate bigint, markup int,
  prices bigint[]                                             -- rows in force for the model
) language plpgsql as $$
begin
  select u.credit_balance_ucr, u.credit_held_ucr, u.holds_stopped_at is not null into balance, held_of_user, stopped
    from users u where u.id = in_user for no key update;
  if not found then return; end if;
  moment := engine_now();
  select coalesce(sum(g.remaining_ucr - g.held_ucr), 0) into expired
    from credit_grants g where g.user_id = in_user and g.expires_at <= moment and g.remaining_ucr > g.held_ucr;
  running := exists (select from activity_attempts a where a.id = in_attempt and a.state = 'running');
  select max(k.state) filter (where k.call_key = in_key),
         coalesce(sum(case k.state when 'started' then k.worst_pusd else k.cost_pusd end), 0)::text
    into known, used from api_key_usage k where k.attempt_id = in_attempt;
  select coalesce(sum(t.held_delta_ucr), 0), coalesce(max(t.hold_no), 0), (array_agg(t.rate_credits_per_usd order by t.hold_no))[1],
         (array_agg(t.markup_bps order by t.hold_no))[1]
    into held, hold_no, rate, markup from credit_transactions t where t.attempt_id = in_attempt and t.kind = 'hold';
  if in_own is null then
    select k.id into key_row from api_keys k
      where k.provider = in_provider and k.fingerprint = decode(in_fingerprint, 'hex') and k.user_id is null;
  else
    select k.id into key_row from api_keys k
      where k.id = in_own and k.user_id = in_user and k.provider = in_provider and k.fingerprint = decode(in_fingerprint, 'hex')
        and k.source = 'sealed' and k.status <> 'revoked';
  end if;
  prices := prices_in_force(in_provider, in_model, in_any, engine_now());
  return next;
end $$;

-- Stores what became of a call, if there is nothing to decide: it is under way, its attempt runs, and the prices at its start are those
-- that its cost was computed with. Otherwise nothing is done, and false.
create function call_ended(
  in_attempt uuid, in_key text, in_user uuid, in_prices bigint[], in_state text, in_model_served text, in_request_id text,
  in_http_status int, in_error_class text, in_finish_reason text, in_stream_completed boolean, in_reported boolean, in_prompt bigint,
  in_cached bigint, in_cache_write bigint, in_output bigint, in_reasoning bigint, in_source text, in_pricing bigint, in_cost bigint,
  in_provider_cost bigint, in_raw jsonb
) returns boolean language plpgsql as $$
declare this record;
begin
  perform from users u where u.id = in_user for no key update;
  if not found then return false; end if;
  select k.id, k.provider, k.model_requested, k.started_at, k.pricing_id, o.user_id as own into this
    from api_key_usage k join activity_attempts a on a.id = k.attempt_id join api_keys o on o.id = k.api_key_id
    where k.attempt_id = in_attempt and k.call_key = in_key and k.state = 'started' and a.state = 'running';
  if not found then return false; end if;
  if this.pricing_id is null then
    if in_pricing is not null then return false; end if;
  elsif prices_in_force(this.provider, this.model_requested, '*', this.started_at) <> in_prices then
    return false;
  end if;
  update api_key_usage k set state = in_state, late = false, finished_at = engine_now(), model_served = in_model_served,
    provider_request_id = coalesce(in_request_id, k.provider_request_id), http_status = in_http_status, error_class = in_error_class,
    finish_reason = in_finish_reason, stream_completed = in_stream_completed,
    tokens_prompt = case when in_reported then in_prompt end, tokens_cached = case when in_reported then least(in_cached, in_prompt) end,
    tokens_cache_write = case when in_reported then least(in_cache_write, in_prompt - least(in_cached, in_prompt)) end,
    tokens_output = case when in_reported then in_output end,
    tokens_reasoning = case when in_reported then least(in_reasoning, in_output) end,
    usage_source = in_source, pricing_id = coalesce(in_pricing, k.pricing_id),
    -- What a user's own key costs is between him and his provider.
    cost_pusd = case when this.own is null then in_cost else 0 end, provider_cost_pusd = in_provider_cost, raw_usage = in_raw
  where k.id = this.id;
  return true;
end $$;
