-- How many units of fine-tunes could be claimed now by somebody. ARGV: limit.
local limit, now, found = tonumber(ARGV[1]), now_ms(), 0
for _, lane in ipairs({ FT_LANES.validating_files, FT_LANES.queued, FT_CHECKPOINTS }) do
  for _, owner in ipairs(redis.call('LRANGE', P .. 'owners:' .. lane, 0, -1)) do
    for _, member in ipairs(redis.call('LRANGE', P .. 'lane:' .. lane .. '|' .. owner, 0, -1)) do
      local id, unit = ft_unit(member)
      if ft_is_due(id, unit, now) then found = found + 1 end
      if found >= limit then return limit end
    end
  end
end
return found
