-- How often a project was offered to go on is counted when a run of it has failed, and many fail together when an outage ends them. And
-- nothing looks a call up by its provider's name for it, which every call of a provider that names them wrote an entry for.
--
-- Forward only; the release before works on this schema. What an operator has to expect: one transaction, a second per million buttons, in
-- which no chat is told anything, and a second at most in which no call begins or ends. Gives up after five seconds of waiting for a lock
-- of the one, one of the other (a long report reads it); nothing was changed then, run it again.
set local lock_timeout = '5s';
create index telegram_buttons_go_on on telegram_buttons (run_id) where action->>'do' = 'go_on';

set local lock_timeout = '1s';
drop index api_key_usage_request;
