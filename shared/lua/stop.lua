-- Ask a batch to stop. ARGV: id, reason -> 'missing', the terminal state it is in,
-- 'late' if its results are being written already, or 'ok'.
local id, reason = ARGV[1], ARGV[2]
local state = field(id, 'state')
if not state then return 'missing' end
if next(TRANSITIONS[state]) == nil then return state end
if not field(id, 'stop_reason') and state ~= 'finalizing' then
  redis.call('HSET', key(id), 'stop_reason', reason)
  if reason == 'cancelled' then
    redis.call('HSET', key(id), 'cancelling_at', math.floor(now_ms() / 1000))
  end
end
redis.call('ZREM', P .. 'deadlines', id)
settle(id)
recount(id)
if state == 'finalizing' and not field(id, 'stop_reason') then return 'late' end
return 'ok'
