-- Keys that cool, keys of users, and budgets per minute that all workers share.

-- `cooling` ends by itself at `cooldown_until`; until then every worker leaves the key alone, for one model or for all.
-- A sealed key belongs to a user: `model` is a model of its own server, `platform_fallback` lets the platform's keys (and
-- the user's credits) serve what it cannot. A revoked one keeps its row, because usage points at it, and nothing of the key.
alter table api_keys
  add column cooling_model text,                -- null: for every model
  add column model text,
  add column platform_fallback boolean not null default false,
  add column sealed_at timestamptz;             -- when these bytes were sealed; clients made from older ones are dropped
create index api_keys_user on api_keys (user_id) where user_id is not null;
create index api_keys_standing on api_keys (provider, fingerprint) where user_id is null and status <> 'active';
create index api_keys_kek on api_keys (kek_id, id) where kek_id is not null;

-- Parts of a budget per minute that workers have taken: what counts against it are the leases that ended less than a
-- minute ago, so no 60 seconds hold more than the budget. Rows are inserted, corrected at most once, by their worker, when
-- less was spent, and deleted; nobody updates a row of others.
create table rate_leases (
  id bigint generated always as identity primary key,
  scope text not null,
  amount bigint not null check (amount >= 0),
  expires_at timestamptz not null               -- nothing of it is spent later
);
create index rate_leases_scope on rate_leases (scope, expires_at);

-- The oldest need of a scope that was refused. Until it is served or its time is over, smaller ones leave it its room:
-- otherwise small prompts would take every part that comes back, and a large one would never find enough at once.
create table rate_wants (
  scope text primary key,
  wanted bigint not null check (wanted > 0),
  wanted_until timestamptz not null
);

-- Takes at least `in_need` and, if there is room, `in_slice` of a budget; gives back what was not spent of an older lease.
-- `granted` 0: nothing, ask again after `wait_ms`. One caller of a scope at a time; a lease is asked for a few times a minute.
create function rate_lease(
  in_scope text, in_budget bigint, in_slice bigint, in_need bigint, in_window interval, in_ttl interval,
  in_back_id bigint, in_back bigint
) returns table (lease_id bigint, granted bigint, wait_ms bigint) language plpgsql as $$
declare
  moment timestamptz;
  room bigint;
  kept bigint;                                  -- room that belongs to an older, larger need, and until when
  kept_until timestamptz;
begin
  perform pg_advisory_xact_lock(hashtextextended('rate_lease ' || in_scope, 0));
  moment := engine_now();
  update rate_leases set amount = greatest(amount - in_back, 0) where id = in_back_id;
  delete from rate_leases where scope = in_scope and expires_at <= moment - in_window;
  select in_budget - coalesce(sum(amount), 0) into room from rate_leases where scope = in_scope;
  -- Whoever needs as much or more may take its place: it comes back and is the oldest again.
  select least(w.wanted, in_budget), w.wanted_until into kept, kept_until from rate_wants w
    where w.scope = in_scope and w.wanted_until > moment and w.wanted > in_need;
  kept := coalesce(kept, 0);
  lease_id := 0; granted := 0; wait_ms := 0;
  if room - kept >= in_need then
    granted := least(greatest(in_slice, in_need), room - kept);
    insert into rate_leases (scope, amount, expires_at) values (in_scope, granted, moment + in_ttl) returning id into lease_id;
    delete from rate_wants w where w.scope = in_scope and (w.wanted <= in_need or w.wanted_until <= moment);
  else
    select ceil(extract(epoch from min(freed.expires_at) + in_window - moment) * 1000) into wait_ms
      from (select l.expires_at, sum(l.amount) over (order by l.expires_at, l.id) as amount
            from rate_leases l where l.scope = in_scope) freed
      where room + freed.amount >= greatest(in_need, kept);
    wait_ms := greatest(coalesce(wait_ms, 1000), 1);
    if kept > 0 then
      -- The older one may be served as soon as there is room for it, but when it asks is not known: a sixtieth of a
      -- window from then, and again; never beyond its time.
      wait_ms := least(
        greatest(case when room >= kept then 1 else wait_ms end, ceil(extract(epoch from in_window) * 1000 / 60)),
        ceil(extract(epoch from kept_until - moment) * 1000) + 1);
    else
      -- It comes back when it was told to; a quarter of a window more, then it has gone elsewhere.
      insert into rate_wants as w values (in_scope, in_need, moment + wait_ms * interval '1 ms' + in_window / 4)
        on conflict (scope) do update set wanted = excluded.wanted, wanted_until = excluded.wanted_until
        where w.wanted_until <= moment;
    end if;
  end if;
  return next;
end $$;
