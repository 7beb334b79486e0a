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

-- Takes at least `in_need` and, if there is room, `in_slice` of a budget; gives back what was not spent of an older lease.
-- `granted` 0: nothing, ask again after `wait_ms`. One caller of a scope at a time; a lease is asked for a few times a minute.
create function rate_lease(
  in_scope text, in_budget bigint, in_slice bigint, in_need bigint, in_window interval, in_ttl interval,
  in_back_id bigint, in_back bigint
) returns table (lease_id bigint, granted bigint, wait_ms bigint) language plpgsql as $$
declare
  moment timestamptz;
  room bigint;
begin
  perform pg_advisory_xact_lock(hashtextextended('rate_lease ' || in_scope, 0));
  moment := engine_now();
  update rate_leases set amount = greatest(amount - in_back, 0) where id = in_back_id;
  delete from rate_leases where scope = in_scope and expires_at <= moment - in_window;
  select in_budget - coalesce(sum(amount), 0) into room from rate_leases where scope = in_scope;
  lease_id := 0; granted := 0; wait_ms := 0;
  if room >= in_need then
    granted := least(greatest(in_slice, in_need), room);
    insert into rate_leases (scope, amount, expires_at) values (in_scope, granted, moment + in_ttl) returning id into lease_id;
  else
    select ceil(extract(epoch from min(freed.expires_at) + in_window - moment) * 1000) into wait_ms
      from (select l.expires_at, sum(l.amount) over (order by l.expires_at, l.id) as amount
            from rate_leases l where l.scope = in_scope) freed
      where room + freed.amount >= in_need;
    wait_ms := greatest(coalesce(wait_ms, 1000), 1);
  end if;
  return next;
end $$;
